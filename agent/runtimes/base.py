"""What every runtime does, and what it may raise. Converters measure with these, so devices run what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest, TensorSpec

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
STRING = "string"  # a dtype of manifests that numpy has not: arrays of objects, each of them a Python string
REASON_LENGTH = 500
# What libraries put around their message: codes, the file's place on this machine, a C++ function's signature.
_NOISE = tuple(
    (re.compile(pattern, re.DOTALL), by)
    for pattern, by in (
        (r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", ""),
        (r"Load model from .*? failed: ?", ""),
        (r"\S*\.(?:cc|cpp|h):\d+ (?:[\w:<>~*&, ]+\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^\]]*\])? ?)?", ""),
        (r"Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: ", r"\1 '\2': "),
        (r" ''", ""),
        (r"^This is an invalid model\. (?:Error: )?", ""),
        (r"\s+", " "),
    )
)


class RuntimeLoadError(Exception):
    """An artifact could not be loaded or warmed up.

    Attributes:
        code: `runtime_missing`, `load_failed`, `warmup_failed`, `provider_unavailable` or
            `precision_unsupported`.
        detail: a sentence with the remedy.
    """

    def __init__(self, code: WireErrorCode, detail: str) -> None:
        super().__init__(f"{code.value}: {detail}")
        self.code = code
        self.detail = detail


class Runtime(Protocol):
    """A loaded artifact. Its class is called with the manifest, the path of the file, and a folder; it loads the file.

    In the folder, which may not be there yet, it may keep what it compiles of the file; None says that it may not.
    It may raise `RuntimeLoadError`, or anything else, which is then `load_failed`. A class may have an attribute
    `providers`, the names of what it can run on: they become facts of the device.

    Attributes:
        version: runtime and version, such as `onnxruntime 1.32.0`.
        provider: the execution provider that really runs it.
        fell_back: why no provider that was wanted before that one runs it, in at most `REASON_LENGTH` characters;
            empty when the first that was wanted does.
    """

    version: str
    provider: str
    fell_back: str

    def run(self, inputs: Tensors) -> Tensors:
        """One inference.

        Args:
            inputs: arrays by source name, with the dtypes and shapes of the manifest.

        Returns:
            Arrays by source name.
        """
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Of the arrays that hold what a manifest calls by this name."""
    return np.dtype(object if dtype == STRING else dtype)


def warm_up_inputs(manifest: Manifest) -> Tensors:
    """One row of zeros, or of empty strings; free dimensions are those of the example where there is one, else 1."""
    return {spec.name: _zeros(spec) for spec in manifest.inputs}


def _zeros(spec: TensorSpec) -> Array:
    example = spec.example_shape if len(spec.example_shape or ()) == len(spec.shape) else None
    sizes = [size if size >= 0 else (example[axis] if example else 1) for axis, size in enumerate(spec.shape)]
    value = "" if spec.dtype == STRING else spec.example_value or 0
    return np.full(sizes, value, dtype=numpy_dtype(spec.dtype))


def to_file(spec: TensorSpec, array: Array) -> Array:
    """A source tensor with the axes the artifact wants."""
    return np.ascontiguousarray(array.transpose(spec.permutation)) if spec.permutation else array


def to_source(spec: TensorSpec, array: Array) -> Array:
    """An artifact's tensor with the axes of the source."""
    return array.transpose(np.argsort(spec.permutation)) if spec.permutation else array


def reason(error: Exception) -> str:
    """A library's error in one short line, without what only its authors can use."""
    text = str(error) or type(error).__name__
    for pattern, by in _NOISE:
        text = pattern.sub(by, text)
    return text.strip()[:REASON_LENGTH]


def reasons(missed: Sequence[str]) -> str:
    """Why each provider that was tried did not do, `provider: why` each, as `Runtime.fell_back` has it."""
    return "; ".join(missed)[:REASON_LENGTH]


def check_file(path: Path) -> None:
    """Refuse a path with nothing at it.

    Raises:
        RuntimeLoadError: `load_failed`.
    """
    if not path.is_file():
        raise RuntimeLoadError(WireErrorCode.LOAD_FAILED, f"there is no artifact at {path}")
