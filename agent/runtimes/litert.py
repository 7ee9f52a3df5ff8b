"""LiteRT (TensorFlow Lite), by `ai-edge-litert` or `tflite-runtime`, with XNNPACK or a delegate (Edge TPU, GPU).

A delegate is believed only when an inference on it worked.
"""

from __future__ import annotations

import importlib.metadata
import threading
from pathlib import Path
from typing import Any

import numpy as np

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import OLD_LITERT, OLD_LITERT_PRECISIONS, Manifest, TensorSpec
from agent.runtimes.base import Array, RuntimeLoadError, Tensors, reason, reasons, to_file, to_source, warm_up_inputs

# By provider, the shared library of its delegate, as the system's loader finds it.
DELEGATES = {"edgetpu": "libedgetpu.so.1", "gpu": "libtensorflowlite_gpu_delegate.so"}
EDGE_TPU_OPERATOR = b"edgetpu-custom-op"
ON_CPU = ("cpu", "xnnpack", "reference")


def _library() -> tuple[Any, str]:
    try:
        from ai_edge_litert import interpreter

        return interpreter, f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}"
    except ImportError:
        from tflite_runtime import interpreter

        return interpreter, f"{OLD_LITERT} {importlib.metadata.version(OLD_LITERT)}"


class LiteRtRuntime:
    """A LiteRT artifact, loaded. An interpreter takes one inference at a time; a lock sees to it."""

    def __init__(self, manifest: Manifest, path: Path, compiled: Path | None = None) -> None:  # noqa: ARG002
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
            self._open(library, manifest, path)
        except (ValueError, RuntimeError) as error:
            raise RuntimeLoadError(WireErrorCode.LOAD_FAILED, f"LiteRT refused the file: {reason(error)}") from None

    def _open(self, library: Any, manifest: Manifest, path: Path) -> None:
        """Take the first provider that proves itself; the CPU where none does."""
        options = {"model_path": str(path), "num_threads": manifest.threads}
        missed: list[str] = []
        for provider in manifest.providers or ("cpu",):
            if provider in DELEGATES:
                why = self._try_delegate(library, provider, manifest, options)
                if why is None:
                    self.provider, self.fell_back = provider, reasons(missed)
                    return
                missed.append(f"{provider}: {why}")
            elif provider in ON_CPU:
                if provider == "reference":
                    options["experimental_op_resolver_type"] = library.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
                self.provider = "cpu" if provider == "reference" else "xnnpack"
                break
            else:
                known = ", ".join((*DELEGATES, *ON_CPU))
                missed.append(f"{provider}: LiteRT has no such provider here, but {known}")
        else:
            self.provider = "xnnpack"
        self.fell_back = reasons(missed)
        self._bind(library.Interpreter(**options), manifest)

    def _try_delegate(self, library: Any, provider: str, manifest: Manifest, options: dict[str, Any]) -> str | None:
        """Have a delegate run the file once; why it can't, or None."""
        if provider == "edgetpu" and EDGE_TPU_OPERATOR not in Path(options["model_path"]).read_bytes():
            return "the file was not compiled for it, which has nothing to do with it"
        name = DELEGATES[provider]
        try:
            delegate = library.load_delegate(name)
        except (OSError, ValueError, RuntimeError) as error:
            return f"its delegate {name} can't be loaded ({reason(error)}): install it, and what drives its device"
        try:
            self._bind(library.Interpreter(**options, experimental_delegates=[delegate]), manifest)
            self.run(warm_up_inputs(manifest))
        except Exception as error:  # noqa: BLE001 (a delegate raises what it likes)
            return f"a first inference failed: {reason(error)}"
        return None

    def _bind(self, interpreter: Any, manifest: Manifest) -> None:
        interpreter.allocate_tensors()
        inputs = {detail["name"]: detail for detail in interpreter.get_input_details()}
        outputs = {detail["name"]: detail for detail in interpreter.get_output_details()}
        self._inputs = [(spec, _detail(inputs, spec)) for spec in manifest.inputs]
        self._outputs = [(spec, _detail(outputs, spec)) for spec in manifest.outputs]
        self._interpreter = interpreter

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
