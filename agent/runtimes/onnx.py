"""ONNX Runtime. A provider is believed only when the session says it has it and an inference on it worked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest, Precision
from agent.runtimes.base import RuntimeLoadError, Tensors, reason, reasons, to_file, to_source, warm_up_inputs

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
_SHORT = {long: short for short, long in PROVIDERS.items()}


class OnnxRuntime:
    """An ONNX artifact, loaded. See `agent.runtimes.base.Runtime`."""

    def __init__(self, manifest: Manifest, path: Path) -> None:
        self._manifest = manifest
        self.version = f"onnxruntime {onnxruntime.__version__}"
        self._session, self.provider, self.fell_back = _open(manifest, path)
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


def options_for(provider: str, manifest: Manifest) -> dict[str, str]:
    """Options of a provider, named as ONNX Runtime does: what the manifest's other fields ask for, then its own.

    TensorRT builds an engine of a net's own precision only when it is allowed to.
    """
    short = _SHORT.get(provider, provider)
    found: dict[str, str] = {}
    if short == "tensorrt" and manifest.precision is Precision.FP16:
        found = {"trt_fp16_enable": "1"}
    if short == "tensorrt" and manifest.precision is Precision.INT8:
        found = {"trt_int8_enable": "1", "trt_fp16_enable": "1"}  # what is not quantized need not be in 32 bits
    memory = manifest.scheduling.gpu_memory_mb * 2**20
    if memory and short in MEMORY_OPTIONS:
        found[MEMORY_OPTIONS[short]] = str(memory)
    for name, values in manifest.provider_options.items():
        if PROVIDERS.get(name.lower(), name) == provider:
            found |= values
    return found


def _open(manifest: Manifest, path: Path) -> tuple[Any, str, str]:
    """A session of the first provider that proves itself, its name, and why none before it did."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = manifest.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    problems: list[str] = []
    available = onnxruntime.get_available_providers()
    for provider in candidates(manifest.providers):
        short = _SHORT.get(provider, provider)
        if provider not in available:
            has = ", ".join(_SHORT.get(one, one) for one in available)
            problems.append(f"{short}: this build of onnxruntime {onnxruntime.__version__} does not have it, but {has}")
            continue
        try:
            chosen = [(provider, options_for(provider, manifest))]
            session = onnxruntime.InferenceSession(str(path), options, providers=chosen, enable_fallback=0)
            if session.get_providers()[0] != provider:
                problems.append(f"{short}: its libraries or its device are missing; the agent's log names what")
                continue
            feed = warm_up_inputs(manifest)
            session.run(None, {spec.file_name or spec.name: to_file(spec, feed[spec.name]) for spec in manifest.inputs})
        except Exception as error:  # noqa: BLE001 (the library raises bare C++ exceptions of many kinds)
            problems.append(f"{short}: {reason(error)}")
            continue
        return session, short, reasons(problems)
    raise RuntimeLoadError(WireErrorCode.LOAD_FAILED, "; ".join(problems))
