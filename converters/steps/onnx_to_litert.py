"""A LiteRT file from an ONNX one, by onnx2tf in an environment of its own.

onnx2tf needs TensorFlow and older libraries than Shoal's, so it runs as a process of another Python. What it makes is
believed only after it has been compared with the ONNX file on real rows (`converters.pipeline`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.dataset import Dataset
from converters.errors import ConversionError
from converters.job import PassRecord

WORKER = Path(__file__).with_name("onnx2tf_worker.py")
MAX_RANK = 5
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Derived:
    """A converted file, the passes that made it, and the versions of the tools."""

    path: Path
    passes: tuple[PassRecord, ...]
    tools: dict[str, str]


def convert(source: Path, folder: Path, python: Path, data: Dataset) -> Derived:
    """Convert an ONNX file to a TFLite fp32 file that takes one row.

    Args:
        source: the ONNX file.
        folder: an existing folder for the results.
        python: the interpreter of an environment with onnx2tf.
        data: rows that tell the sizes of free dimensions other than the first.

    Raises:
        ConversionError: `not_convertible`, with the tool's own reason.
    """
    started = time.monotonic()
    work = folder / "onnx2tf"
    work.mkdir()
    fixed = work / "fixed.onnx"
    shapes = fix_shapes(source, fixed, data)
    frozen = PassRecord("onnx-fix-shapes", {"shapes": json.dumps(shapes)}, round(time.monotonic() - started, 3))
    started = time.monotonic()
    command = [str(python), str(WORKER), str(fixed), str(work), str(os.getpid())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, check=False, env=environment, cwd=work)
    if done.returncode != 0:
        said = _last_words(done.stderr or done.stdout)
        detail = f"onnx2tf can't convert this net to LiteRT ({said}): push the version with a TFLite form of its own"
        raise ConversionError("not_convertible", detail, "sources")
    target = folder / "derived.tflite"
    shutil.move(work / "model.tflite", target)
    tools: dict[str, str] = json.loads((work / "tools.json").read_text())
    record = PassRecord("onnx2tf", {"layout": "inputs keep their shapes"}, round(time.monotonic() - started, 3))
    shutil.rmtree(work)
    return Derived(target, (frozen, record), tools)


def fix_shapes(source: Path, target: Path, data: Dataset) -> dict[str, list[int]]:
    """Write an ONNX file for one row, with every shape fixed and what follows from that folded; returns the shapes.

    Raises:
        ConversionError: when ONNX Runtime can't load the file with those shapes.
    """
    import onnx
    import onnxruntime

    model = onnx.load(str(source))
    constants = {tensor.name for tensor in model.graph.initializer}
    sizes: dict[str, int] = {}
    shapes = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        dims = value.type.tensor_type.shape.dim
        row = data.inputs[value.name].shape
        for axis, dim in enumerate(dims):
            if not dim.HasField("dim_value"):
                size = 1 if axis == 0 else int(row[axis])
                if dim.dim_param:
                    sizes[dim.dim_param] = size
                dim.dim_value = size
        shapes[value.name] = [dim.dim_value for dim in dims]
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    del model.graph.value_info[:]
    given = target.with_suffix(".given.onnx")
    onnx.save(model, str(given))
    options = onnxruntime.SessionOptions()
    # Basic: constant folding and the like; higher levels write operators that only ONNX Runtime has.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(given), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors have no common base)
        detail = f"sources: with the shapes {shapes} the net does not load: {str(error)[:300]}"
        raise ConversionError("not_convertible", detail, "sources") from None
    return shapes


def find_permutation(source: npt.NDArray[Any], file: npt.NDArray[Any]) -> tuple[int, ...] | None:
    """How a source's answer is transposed to get the file's: the nearest fit over all orders that keep rows first.

    Args:
        source: (rows, …), any float or integer dtype.
        file: the same answer, perhaps with its axes in another order.

    Returns:
        Axes as numpy's `transpose` takes them; None when the order is the same.

    Raises:
        ConversionError: when no order gives the file's shape.
    """
    if source.ndim != file.ndim or source.ndim > MAX_RANK:
        if source.shape == file.shape:
            return None
        raise _no_order(source, file)
    same = tuple(range(source.ndim))
    orders = [(0, *rest) for rest in permutations(same[1:])] if same else [()]
    fitting = [order for order in orders if tuple(source.shape[axis] for axis in order) == file.shape]
    if not fitting:
        raise _no_order(source, file)
    wanted = file.astype(np.float64)
    best = min(fitting, key=lambda order: _distance(source.transpose(order).astype(np.float64), wanted))
    return None if best == same else best


def _distance(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(np.abs(one - other).mean()) if one.size else 0.0


def _no_order(source: npt.NDArray[Any], file: npt.NDArray[Any]) -> ConversionError:
    detail = (
        f"onnx2tf made an answer of shape {list(file.shape)} where the source's is {list(source.shape)}: "
        "push the version with a TFLite form of its own"
    )
    return ConversionError("not_convertible", detail, "sources")


def _last_words(output: bytes) -> str:
    lines = [_COLOUR.sub("", line).strip() for line in output.decode(errors="replace").splitlines()]
    words = [line for line in lines if line]
    return words[-1][:300] if words else "it ended without a word"
