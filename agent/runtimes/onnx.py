"""ONNX Runtime. A provider is believed only when the session says it has it and an inference on it worked."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest, Precision
from agent.runtimes.base import RuntimeLoadError, Tensors, reason, reasons, to_file, to_source, warm_up_inputs

log = logging.getLogger(__name__)
CPU = "CPUExecutionProvider"
PROVIDERS = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "acl": "ACLExecutionProvider",
    "qnn": "QNNExecutionProvider",
}
MEMORY_OPTIONS = {"cuda": "gpu_mem_limit", "rocm": "gpu_mem_limit", "tensorrt": "trt_max_workspace_size"}  # bytes
# How each provider is told where to keep what it compiled: `{}` is the folder.
_KEEPING = {
    "tensorrt": {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "{}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "{}",
    },
    "openvino": {"cache_dir": "{}"},
    "coreml": {"ModelCacheDirectory": "{}"},
}
_SHORT = {long: short for short, long in PROVIDERS.items()}


class OnnxRuntime:
    """An ONNX artifact, loaded. See `agent.runtimes.base.Runtime`."""

    def __init__(self, manifest: Manifest, path: Path, compiled: Path | None = None) -> None:
        self._manifest = manifest
        self.version = f"onnxruntime {onnxruntime.__version__}"
        self._session, self.provider, self.fell_back = _open(manifest, path, compiled)
        self._inputs = [(spec, spec.file_name or spec.name) for spec in manifest.inputs]
        self._outputs = [(spec, spec.file_name or spec.name) for spec in manifest.outputs]
        self._names = [name for _, name in self._outputs]

    def run(self, inputs: Tensors) -> Tensors:
        """One inference; see `agent.runtimes.base.Runtime`."""
        feed = {name: to_file(spec, inputs[spec.name]) for spec, name in self._inputs}
        values = self._session.run(self._names, feed)
        return {spec.name: to_source(spec, value) for (spec, _), value in zip(self._outputs, values, strict=True)}

    def close(self) -> None:
        """Let the session go."""
        self._session = None


def candidates(wanted: tuple[str, ...]) -> list[str]:
    """ONNX Runtime's names of the wanted providers, in order, and the CPU at the end where it is not among them."""
    return list(dict.fromkeys([*(PROVIDERS.get(name.lower(), name) for name in wanted), CPU]))


def options_for(provider: str, manifest: Manifest, compiled: Path | None = None) -> dict[str, str]:
    """Options of a provider, named as ONNX Runtime does: what the manifest's other fields ask for, then its own.

    TensorRT builds an engine of a net's own precision only when it is allowed to.

    Args:
        provider: as ONNX Runtime names it.
        manifest: with options of its own.
        compiled: a folder in which the provider may keep what it compiled; None for none.
    """
    short = _SHORT.get(provider, provider)
    found = {name: value.format(compiled) for name, value in _KEEPING.get(short, {}).items()} if compiled else {}
    if short == "tensorrt" and manifest.precision is Precision.FP16:
        found |= {"trt_fp16_enable": "1"}
    if short == "tensorrt" and manifest.precision is Precision.INT8:
        found |= {"trt_int8_enable": "1", "trt_fp16_enable": "1"}  # what is not quantized need not be in 32 bits
    memory = manifest.scheduling.gpu_memory_mb * 2**20
    if memory and short in MEMORY_OPTIONS:
        found[MEMORY_OPTIONS[short]] = str(memory)
    for name, values in manifest.provider_options.items():
        if PROVIDERS.get(name.lower(), name) == provider:
            found |= values
    return found


def _open(manifest: Manifest, path: Path, compiled: Path | None) -> tuple[Any, str, str]:
    """A session of the first provider that proves itself, its name, and why none before it did."""
    problems: list[str] = []
    available = onnxruntime.get_available_providers()
    for provider in candidates(manifest.providers):
        short = _SHORT.get(provider, provider)
        if provider not in available:
            has = ", ".join(_SHORT.get(one, one) for one in available)
            problems.append(f"{short}: this build of onnxruntime {onnxruntime.__version__} does not have it, but {has}")
            continue
        folder = folder_for(short, compiled)
        try:
            try:
                session = _proven(provider, manifest, path, folder)
            except Exception:
                if folder is None:
                    raise
                # What was kept may be damaged, or of another driver: it is let go, and nothing is kept this time.
                log.warning("%s can't run %s with what it compiled before: once more without", short, path.name)
                shutil.rmtree(folder, ignore_errors=True)
                session = _proven(provider, manifest, path, None)
        except Exception as error:  # noqa: BLE001 (the library raises bare C++ exceptions of many kinds)
            problems.append(f"{short}: {reason(error)}")
            continue
        if session is not None:
            return session, short, reasons(problems)
        problems.append(f"{short}: its libraries or its device are missing; the agent's log names what")
    raise RuntimeLoadError(WireErrorCode.LOAD_FAILED, "; ".join(problems))


def _proven(provider: str, manifest: Manifest, path: Path, compiled: Path | None) -> Any:
    """A session that a provider runs, after an inference; None where the session did not take it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = manifest.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    chosen = [(provider, options_for(provider, manifest, compiled))]
    session = onnxruntime.InferenceSession(str(path), options, providers=chosen, enable_fallback=0)
    if session.get_providers()[0] != provider:
        return None
    feed = warm_up_inputs(manifest)
    session.run(None, {spec.file_name or spec.name: to_file(spec, feed[spec.name]) for spec in manifest.inputs})
    return session


def folder_for(provider: str, compiled: Path | None) -> Path | None:
    """A folder for what a provider compiles with this version of the library; None where none is wanted or writable."""
    if compiled is None or provider not in _KEEPING:
        return None
    folder = compiled / f"onnxruntime-{onnxruntime.__version__}" / provider
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log.warning("what %s compiles can't be kept, each start compiles it anew: %s", provider, error)
        return None
