"""Inference runtimes, one file each or of a package, behind `agent.runtimes.base.Runtime`."""

from __future__ import annotations

import logging
from pathlib import Path

from agent import runtime_registry
from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest
from agent.runtimes.base import Runtime, RuntimeLoadError, check_file, reason, warm_up_inputs

log = logging.getLogger(__name__)


def open_runtime(
    manifest: Manifest, path: Path, *, may_fall_back: bool = True, compiled: Path | None = None
) -> Runtime:
    """Load an artifact and prove it by one inference on zeros.

    Args:
        manifest: of the artifact.
        path: of its file.
        may_fall_back: whether another execution provider than the first wanted will do.
        compiled: a folder of the file's own in which what a provider compiles may be kept; None for none.

    Raises:
        RuntimeLoadError: when the runtime is not installed, or the artifact does not load or run; and, where it may not
            fall back, when the first provider that its manifest wants can't run it.
    """
    check_file(path)
    runtime = _made(manifest, path, compiled)
    try:
        runtime.run(warm_up_inputs(manifest))
    except Exception as error:
        let_go(runtime)
        raise RuntimeLoadError(WireErrorCode.WARMUP_FAILED, f"a first inference failed: {reason(error)}") from error
    if runtime.fell_back and not may_fall_back:
        let_go(runtime)
        detail = (
            f"{manifest.providers[0]} is wanted first and can't run it here ({runtime.fell_back}); {runtime.provider} "
            "could, which the rollout forbids (on_provider_missing): mend the device, or let it fall back"
        )
        raise RuntimeLoadError(WireErrorCode.PROVIDER_UNAVAILABLE, detail)
    if runtime.fell_back:
        log.warning("runs on %s, because: %s", runtime.provider, runtime.fell_back)
    return runtime


def let_go(runtime: Runtime) -> None:
    """Close a runtime. One that fails in that is let go all the same: whoever lets it go has more to do."""
    try:
        runtime.close()
    except Exception as error:  # noqa: BLE001 (a vendor's runtime may fail in any way)
        log.warning("%s failed while it was closed: %s", runtime.version, reason(error))


def _made(manifest: Manifest, path: Path, compiled: Path | None) -> Runtime:
    name = manifest.runtime
    try:
        made = runtime_registry.load(name)
    except LookupError:
        has = ", ".join(map(str, runtime_registry.installed())) or "none"
        detail = (
            f"this device has no runtime {name}, but {has}: install the package that brings it (an entry point of "
            f"{runtime_registry.GROUP}) where the agent is, and start the agent again"
        )
        raise RuntimeLoadError(WireErrorCode.RUNTIME_MISSING, detail) from None
    except ImportError as error:
        raise _missing(name, error) from None
    try:
        runtime: Runtime = made(manifest, path, compiled)
    except ImportError as error:
        raise _missing(name, error) from None
    except RuntimeLoadError:
        raise
    except Exception as error:
        detail = f"the runtime {name} refused the file: {reason(error)}"
        raise RuntimeLoadError(WireErrorCode.LOAD_FAILED, detail) from error
    return runtime


def _missing(name: str, error: ImportError) -> RuntimeLoadError:
    extra = runtime_registry.EXTRAS.get(name)
    remedy = f"pip install 'shoal[{extra}]'" if extra else "install what its package needs"
    detail = f"the runtime {name} is not installed ({reason(error)}): {remedy}"
    return RuntimeLoadError(WireErrorCode.RUNTIME_MISSING, detail)
