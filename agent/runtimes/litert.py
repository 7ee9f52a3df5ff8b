"""LiteRT (TensorFlow Lite), by `ai-edge-litert` or `tflite-runtime`, with XNNPACK or an Edge TPU delegate."""

from __future__ import annotations

import importlib.metadata
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import OLD_LITERT, OLD_LITERT_PRECISIONS, Manifest, TensorSpec
from agent.runtimes.base import Array, RuntimeLoadError, Tensors, reason, to_file, to_source

log = logging.getLogger(__name__)
EDGE_TPU_LIBRARY = "libedgetpu.so.1"
EDGE_TPU_OPERATOR = b"edgetpu-custom-op"


def _library() -> tuple[Any, str]:
    try:
        from ai_edge_litert import interpreter

        return interpreter, f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}"
    except ImportError:
        from tflite_runtime import interpreter

        return interpreter, f"{OLD_LITERT} {importlib.metadata.version(OLD_LITERT)}"


class LiteRtRuntime:
    """A LiteRT artifact, loaded. An interpreter takes one inference at a time; a lock sees to it."""

    def __init__(self, manifest: Manifest, path: Path) -> None:
        library, self.version = _library()
        if self.version.startswith(OLD_LITERT) and manifest.precision not in OLD_LITERT_PRECISIONS:
            detail = (
                f"{self.version} runs {manifest.precision.value} wrongly or crashes: install ai-edge-litert on the "
                f"device, or give its profile `match: {{runtimes.litert.package: {OLD_LITERT}}}` and the precisions "
                "fp32 and int8"
            )
            raise RuntimeLoadError(WireErrorCode.PRECISION_UNSUPPORTED, detail)
        self._lock = threading.Lock()
        try:
            self._interpreter, self.provider = _open(library, manifest, path)
            self._interpreter.allocate_tensors()
            inputs = {detail["name"]: detail for detail in self._interpreter.get_input_details()}
            outputs = {detail["name"]: detail for detail in self._interpreter.get_output_details()}
            self._inputs = [(spec, _detail(inputs, spec)) for spec in manifest.inputs]
            self._outputs = [(spec, _detail(outputs, spec)) for spec in manifest.outputs]
        except (ValueError, RuntimeError) as error:
            raise RuntimeLoadError(WireErrorCode.LOAD_FAILED, f"LiteRT refused the file: {reason(error)}") from None

    def run(self, inputs: Tensors) -> Tensors:
        """One inference; see `agent.runtimes.base.Runtime`."""
        with self._lock:
            feed = [(detail, to_file(spec, inputs[spec.name])) for spec, detail in self._inputs]
            self._resize(feed)
            for detail, array in feed:
                self._interpreter.set_tensor(detail["index"], _encode(array, detail))
            self._interpreter.invoke()
            return {
                spec.name: to_source(
                    spec, _decode(self._interpreter.get_tensor(detail["index"]), detail, np.dtype(spec.dtype))
                )
                for spec, detail in self._outputs
            }

    def close(self) -> None:
        """Let the interpreter go."""
        self._interpreter = None

    def _resize(self, feed: list[tuple[dict[str, Any], Array]]) -> None:
        changed = False
        for detail, array in feed:
            if tuple(detail["shape"]) != array.shape:
                self._interpreter.resize_tensor_input(detail["index"], array.shape)
                detail["shape"] = np.array(array.shape)
                changed = True
        if changed:
            self._interpreter.allocate_tensors()


def _open(library: Any, manifest: Manifest, path: Path) -> tuple[Any, str]:
    options = {"model_path": str(path), "num_threads": manifest.threads}
    for provider in manifest.providers or ("cpu",):
        if provider == "edgetpu":
            if EDGE_TPU_OPERATOR not in path.read_bytes():
                log.warning("%s was not compiled for the Edge TPU, which has nothing to do with it", path.name)
                continue
            try:
                delegate = library.load_delegate(EDGE_TPU_LIBRARY)
                return library.Interpreter(**options, experimental_delegates=[delegate]), "edgetpu"
            except (OSError, ValueError, RuntimeError) as error:
                log.warning("the Edge TPU is not usable, going on without: %s", error)
        elif provider == "reference":
            resolver = library.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            return library.Interpreter(**options, experimental_op_resolver_type=resolver), "cpu"
    return library.Interpreter(**options), "xnnpack"


def _detail(details: dict[str, Any], spec: TensorSpec) -> dict[str, Any]:
    name = spec.file_name or spec.name
    if name not in details:
        raise ValueError(f"the file has no tensor {name!r}, but {sorted(details)}")
    return dict(details[name])


def _encode(array: Array, detail: dict[str, Any]) -> Array:
    """To the file's dtype: quantized where the file wants integers and the source has floats."""
    wanted = np.dtype(detail["dtype"])
    if array.dtype == wanted:
        return array
    scale, zero = detail["quantization"]
    if wanted.kind in "iu" and array.dtype.kind == "f" and scale:
        info = np.iinfo(wanted)
        encoded: Array = np.clip(np.rint(array / scale + zero), info.min, info.max).astype(wanted)
        return encoded
    plain: Array = array.astype(wanted)
    return plain


def _decode(array: Array, detail: dict[str, Any], wanted: np.dtype[Any]) -> Array:
    scale, zero = detail["quantization"]
    if array.dtype.kind in "iu" and wanted.kind == "f" and scale:
        decoded: Array = ((array.astype(np.float32) - zero) * scale).astype(wanted)
        return decoded
    same: Array = array if array.dtype == wanted else array.astype(wanted)
    return same
