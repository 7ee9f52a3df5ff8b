"""Which inference runtimes this machine has: those that come with the agent, and those that packages bring.

A package brings one by an entry point of the group `shoal.runtimes`: its name is what profiles and manifests call the
runtime, and it refers to a class as `agent.runtimes.base.Runtime` says. What comes with the agent needs no metadata,
and its names can't be taken. Nothing is imported here before it is asked for.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import RUNTIME_NAME, RuntimeName

if TYPE_CHECKING:  # at run time only where packages are looked at: it takes as long to import as half the agent
    from importlib.metadata import EntryPoint

GROUP = "shoal.runtimes"
PACKAGES = {
    RuntimeName.ONNX: ("onnxruntime", "onnxruntime-gpu"),
    RuntimeName.LITERT: ("ai-edge-litert", "tflite-runtime"),
    RuntimeName.TORCH: ("torch",),
}
EXTRAS: dict[str, str] = {RuntimeName.ONNX: "cpu", RuntimeName.LITERT: "tflite", RuntimeName.TORCH: "torch"}
_CLASSES = {
    RuntimeName.ONNX: "agent.runtimes.onnx:OnnxRuntime",
    RuntimeName.LITERT: "agent.runtimes.litert:LiteRtRuntime",
    RuntimeName.TORCH: "agent.runtimes.torch_export:TorchRuntime",
}
_PROBE_S = 60.0
_MOST = 16  # of other packages, that are looked at
_PROBE = "import sys; from agent.runtime_registry import providers_of; print(*providers_of(sys.argv[1]))"


@dataclass(frozen=True)
class Installed:
    """A runtime, by the distribution that provides it and that one's version."""

    name: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} ({self.package} {self.version})"


def load(name: str) -> Any:
    """The class of a runtime.

    Raises:
        LookupError: when there is none of that name.
        Exception: whatever importing it raises.
    """
    if name in _CLASSES:
        module, _, cls = _CLASSES[RuntimeName(name)].partition(":")
        return getattr(importlib.import_module(module), cls)
    return _others()[name].load()


def providers_of(name: str) -> tuple[str, ...]:
    """The execution providers that a package's runtime says it has (`providers` of its class)."""
    found = [str(one) for one in getattr(load(name), "providers", ())]
    return tuple(one for one in found if RUNTIME_NAME.match(one))[: LIMITS.sources]


def installed() -> tuple[Installed, ...]:
    """What there is by its packages' metadata; whether it can be imported is not asked."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name, packages in PACKAGES.items():
        for package in packages:
            try:
                found.append(Installed(name.value, package, version(package)))
            except PackageNotFoundError:
                continue
            if name is RuntimeName.LITERT:
                break  # the first is the one that is used where both are installed
    for name_, point in _others().items():
        if point.dist is not None:
            found.append(Installed(name_, point.dist.name, point.dist.version))
    return tuple(found)


def asked_providers(one: Installed) -> tuple[str, ...] | None:
    """The providers of a package's runtime, asked of a short-lived process; None where it can't be imported."""
    command = [sys.executable, "-c", _PROBE, one.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return tuple(done.stdout.split())


def _others() -> dict[str, EntryPoint]:
    """By name, what other packages bring."""
    from importlib.metadata import entry_points

    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    fit = [point for point in points if point.name not in _CLASSES and RUNTIME_NAME.match(point.name)]
    return {point.name: point for point in fit[:_MOST]}
