"""Inference runtimes, one file each, behind `agent.runtimes.base.Runtime`."""

from __future__ import annotations

import logging
from pathlib import Path

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest, RuntimeName
from agent.runtimes.base import Runtime, RuntimeLoadError, check_file, reason, warm_up_inputs

log = logging.getLogger(__name__)


def open_runtime(manifest: Manifest, path: Path, *, may_fall_back: bool = True) -> Runtime:
    """Load an artifact and prove it by one inference on zeros.

    Args:
        manifest: of the artifact.
        path: of its file.
        may_fall_back: whether another execution provider than the first wanted will do.

    Raises:
        RuntimeLoadError: when the runtime is not installed, or the artifact does not load or run; and, where it may not
            fall back, when the first provider that its manifest wants can't run it.
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
    if runtime.fell_back and not may_fall_back:
        runtime.close()
        detail = (
            f"{manifest.providers[0]} is wanted first and can't run it here ({runtime.fell_back}); {runtime.provider} "
            "could, which the rollout forbids (on_provider_missing): mend the device, or let it fall back"
        )
        raise RuntimeLoadError(WireErrorCode.PROVIDER_UNAVAILABLE, detail)
    if runtime.fell_back:
        log.warning("runs on %s, because: %s", runtime.provider, runtime.fell_back)
    return runtime
