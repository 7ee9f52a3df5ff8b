"""Facts of a simulated device: such as a profile asks for, or as a file says. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from agent import __version__
from agent.protocol.commands import FEATURE as COMMANDS
from agent.protocol.facts import AcceleratorFacts, DeviceFacts, LinkFacts, RuntimeFacts
from agent.protocol.samples import FEATURE as SAMPLES

OS = "Simulated by Shoal"
PACKAGES = {"onnx": "onnxruntime", "litert": "ai-edge-litert"}
VERSIONS = {"onnx": "1.31.1", "litert": "2.3.0"}
_TEXTS = ("arch", "os", "kernel", "cpu_model")
_NUMBERS = ("cpu_cores", "memory_mb", "disk_free_mb")


class FactsError(ValueError):
    """No facts can be made so; the message says what to write instead."""


def of_profile(profile: Mapping[str, Any]) -> DeviceFacts:
    """Facts of a device that is of a profile's kind.

    Args:
        profile: as its file has it: `match`, `runtime`, `providers`.

    Raises:
        FactsError: when a condition is over a fact that can't be made up.
    """
    runtime = str(profile["runtime"])
    facts: dict[str, Any] = {
        "arch": "x86_64",
        "cpu_features": [],
        "memory_mb": 4096,
        "cpu_cores": 4,
        "accelerator": {},
        "providers": list(profile.get("providers", ["cpu"])),
        "tags": {},
    }
    for path, wanted in profile.get("match", {}).items():
        _fulfil(facts, path, wanted, runtime)
    accelerators = (AcceleratorFacts(**{"name": "simulated", "kind": "cuda", **facts["accelerator"]}),)
    return DeviceFacts(
        agent_version=__version__,
        os=str(facts.get("os", OS)),
        kernel=str(facts.get("kernel", "simulated")),
        arch=str(facts["arch"]),
        cpu_model=str(facts.get("cpu_model", "simulated")),
        cpu_cores=int(facts["cpu_cores"]),
        cpu_features=tuple(facts["cpu_features"]),
        memory_mb=int(facts["memory_mb"]),
        disk_free_mb=int(facts.get("disk_free_mb", 16_384)),
        accelerators=accelerators if facts["accelerator"] else (),
        runtimes=(
            RuntimeFacts(
                runtime,
                str(facts.get("package", PACKAGES.get(runtime, runtime))),
                str(facts.get("version", VERSIONS.get(runtime, "1"))),
                tuple(facts["providers"]),
            ),
        ),
        tags=facts["tags"],
        link=LinkFacts("ethernet"),
        features=(COMMANDS, SAMPLES),
    )


def of_mapping(given: Mapping[str, Any]) -> DeviceFacts:
    """Facts as a file says them; what it leaves out is made up.

    Raises:
        FactsError: naming the field that is wrong or unknown.
    """
    unknown = sorted(set(given) - set(DeviceFacts.__struct_fields__))
    if unknown:
        raise FactsError(f"{unknown[0]!r} is no fact; there are {', '.join(DeviceFacts.__struct_fields__)}")
    base = msgspec.to_builtins(of_profile({"runtime": "onnx"}))
    try:
        return msgspec.convert({**base, **given}, DeviceFacts)
    except msgspec.ValidationError as error:
        raise FactsError(str(error)) from None


def _fulfil(facts: dict[str, Any], path: str, wanted: Any, runtime: str) -> None:
    """Let a condition of a profile hold (`fleet_server.devices.matching` reads them)."""
    value = wanted[0] if isinstance(wanted, list) else wanted
    least = isinstance(value, Mapping)
    number = value["min"] if least else value
    head, _, rest = path.partition(".")
    part = rest.removeprefix(f"{runtime}.")
    if path in _NUMBERS:
        facts[path] = max(int(number), facts.get(path, 0)) if least else int(number)
    elif least:
        raise FactsError(f"a profile asks for at least {number} of {path!r}, which can't be made up: give `facts`")
    elif path in _TEXTS:
        facts[path] = value
    elif path == "cpu_features":
        facts["cpu_features"].append(value)
    elif head == "tags" and rest:
        facts["tags"][rest] = str(value)
    elif head == "accelerators" and rest in AcceleratorFacts.__struct_fields__:
        facts["accelerator"][rest] = value
    elif head == "runtimes" and part == "providers":
        facts["providers"] = [value, *(one for one in facts["providers"] if one != value)]
    elif head == "runtimes" and part in {"version", "package"}:
        facts[part] = value
    elif path != "runtimes.name" or value != runtime:
        raise FactsError(f"a profile asks for {path!r}, which can't be made up: give `facts` in its place")
