"""What devices can be asked for by, from what they reported and what people said of them: pure.

A device has any number of attributes of a name: every accelerator, provider and served model is one. They are rows of
their own (`device_attributes`), so that a database finds devices by them without reading facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fleet_server.devices.matching import effective_tags

TAG = "tag."
LONGEST_TEXT = 256
# Selectors that are no tags, and what they mean; those of `COLUMNS` are not rows but columns of a device.
COLUMNS = {
    "id": "its id",
    "profile": "name of its profile",
    "online": "true or false",
}
NAMES = {
    "arch": "such as aarch64",
    "os": "as the device names it",
    "kernel": "its version",
    "agent_version": "of the agent",
    "cpu_model": "as the kernel names it",
    "cpu_cores": "a number",
    "cpu_feature": "such as avx512_vnni",
    "memory_mb": "MiB of memory",
    "disk_free_mb": "MiB that were free when the agent started",
    "accelerator": "kind of one, such as cuda",
    "accelerator.name": "as the driver names it",
    "accelerator.memory_mb": "MiB of its own",
    "compute_capability": "of a CUDA device, a number such as 8.7",
    "runtime": "name of one: onnx, litert, torch",
    "runtime.package": "such as onnxruntime-gpu",
    "provider": "execution provider that a runtime says it has",
    "model": "one that answers requests there",
    "version": "model@version that answers requests there",
    "running.provider": "execution provider that really runs a model",
    "lan": "name of the one whose devices answer requests in each other's place",
    "fell_back": "execution provider that runs a model in the place of the one its profile wants first",
}


class Attribute(NamedTuple):
    """One thing a device can be asked for by: a name, and its value as text, and as a number where it is one."""

    name: str
    text: str
    number: float | None


def attributes_of(
    facts: Mapping[str, Any], tags: Mapping[str, str], serving: Sequence[Mapping[str, Any]]
) -> frozenset[Attribute]:
    """Every attribute of a device.

    Args:
        facts: `agent.protocol.facts.DeviceFacts` as JSON.
        tags: those that people gave it.
        serving: `agent.protocol.messages.ServingReport`s as JSON.
    """
    found: list[tuple[str, Any]] = [
        (name, facts.get(name))
        for name in ("arch", "os", "kernel", "agent_version", "cpu_model", "cpu_cores", "memory_mb", "disk_free_mb")
    ]
    found += [("cpu_feature", feature) for feature in facts.get("cpu_features", ())]
    for accelerator in facts.get("accelerators", ()):
        found += [
            ("accelerator", accelerator.get("kind")),
            ("accelerator.name", accelerator.get("name")),
            ("accelerator.memory_mb", accelerator.get("memory_mb")),
            ("compute_capability", accelerator.get("compute_capability")),
        ]
    for runtime in facts.get("runtimes", ()):
        found += [("runtime", runtime.get("name")), ("runtime.package", runtime.get("package"))]
        found += [("provider", provider) for provider in runtime.get("providers", ())]
    for one in serving:
        found += [
            ("model", one["model"]),
            ("version", f"{one['model']}@{one['version']}"),
            ("running.provider", one.get("provider")),
            ("fell_back", one.get("provider") if one.get("fell_back") else None),
        ]
    found.append(("lan", facts.get("balancing_lan") or None))
    found += [(TAG + name, value) for name, value in effective_tags(facts, tags).items()]
    return frozenset(
        Attribute(name, str(value)[:LONGEST_TEXT], number_of(str(value))) for name, value in found if value is not None
    )


def number_of(text: str) -> float | None:
    """A text as a finite number, where it is one."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None
