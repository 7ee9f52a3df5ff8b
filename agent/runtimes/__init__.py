"""Inference runtimes, one file each, behind `agent.runtimes.base.Runtime`."""

from __future__ import annotations

from pathlib import Path

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest, RuntimeName
from agent.runtimes.base import Runtime, RuntimeLoadError, check_file, reason, warm_up_inputs


def open_runtime(manifest: Manifest, path: Path) -> Runtime:
    """Load an artifact and prove it by one inference on zeros.

    Raises:
        RuntimeLoadError: when the runtime is not installed, or the artifact does not load or run.
    """
    check_file(path)
    try:
        if manifest.runtime is RuntimeName.ONNX:
            from agent.runtimes.onnx import OnnxRuntime

            runtime: Runtime = OnnxRuntime(manifest, path)
        else:
            from agent.runtimes.litert import LiteRtRuntime

            runtime = LiteRtRuntime(manifest, path)
    except ImportError as error:
        extra = "cpu" if manifest.runtime is RuntimeName.ONNX else "tflite"
        detail = f"the runtime {manifest.runtime.value} is not installed ({error}): pip install 'shoal[{extra}]'"
        raise RuntimeLoadError(WireErrorCode.RUNTIME_MISSING, detail) from None
    try:
        runtime.run(warm_up_inputs(manifest))
    except Exception as error:
        runtime.close()
        raise RuntimeLoadError(WireErrorCode.WARMUP_FAILED, f"a first inference failed: {reason(error)}") from error
    return runtime
