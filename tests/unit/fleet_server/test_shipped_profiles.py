"""Profiles that come with Shoal are valid and fit the machines they are meant for; detection describes a machine."""

from __future__ import annotations

from typing import Any

import pytest

from fleet_server.cli.profiles import detected
from fleet_server.devices import shipped
from fleet_server.devices.matching import NamedProfile, best_profile
from fleet_server.devices.schemas import ProfileCreate


def facts(
    arch: str,
    features: str,
    *,
    providers: str = "cpu",
    accelerator: tuple[str, str] | None = None,
    litert: bool = False,
) -> dict[str, Any]:
    runtimes = [{"name": "litert", "version": "2.3.0", "providers": ["xnnpack"]}] if litert else []
    if providers:
        runtimes.append({"name": "onnx", "version": "1.32.0", "providers": providers.split()})
    return {
        "arch": arch,
        "cpu_features": features.split(),
        "memory_mb": 4096,
        "runtimes": runtimes,
        "accelerators": [{"kind": accelerator[0], "compute_capability": accelerator[1]}] if accelerator else [],
    }


def specs() -> list[NamedProfile]:
    return [NamedProfile(name, name, ProfileCreate.model_validate(shipped.load(name))) for name in shipped.names()]


def test_every_profile_is_named_as_its_file_and_says_where_its_facts_come_from() -> None:
    assert len(shipped.names()) >= 10
    for name in shipped.names():
        assert ProfileCreate.model_validate(shipped.load(name)).name == name
        assert "# Facts: " in (shipped.FOLDER / f"{name}.yaml").read_text()
        assert shipped.about(name).endswith(".")


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        ("x86-64-avx2", facts("x86_64", "avx2 fma")),
        ("x86-64-vnni", facts("x86_64", "avx2 avx512_vnni")),
        ("raspberry-pi-4", facts("aarch64", "asimd", litert=True)),
        ("raspberry-pi-5", facts("aarch64", "asimd asimddp")),
        ("android-class-arm64", facts("aarch64", "asimd asimddp", providers="", litert=True)),
        ("jetson-orin", facts("aarch64", "asimd", providers="tensorrt cuda cpu", accelerator=("cuda", "8.7"))),
        ("jetson-nano", facts("aarch64", "asimd", providers="cuda cpu", accelerator=("cuda", "5.3"))),
        ("nvidia-gpu", facts("x86_64", "avx2", providers="tensorrt cuda cpu", accelerator=("cuda", "9.0"))),
        ("intel-openvino", facts("x86_64", "avx2", providers="openvino cpu")),
        ("coral-edge-tpu", facts("x86_64", "avx2", litert=True, accelerator=("edgetpu", ""))),
        ("apple-coreml", facts("arm64", "", providers="coreml cpu")),
    ],
)
def test_the_closest_profile_is_the_one_that_was_meant(name: str, machine: dict[str, Any]) -> None:
    found = best_profile(machine, {}, specs())
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "machine",
    [
        facts("x86_64", "avx2 avx512_vnni"),
        facts("aarch64", "asimd", providers="", litert=True),
        facts("x86_64", "avx2", providers="tensorrt cuda cpu", accelerator=("cuda", "9.0")),
    ],
)
def test_a_detected_profile_fits_its_machine(machine: dict[str, Any]) -> None:
    made = ProfileCreate.model_validate(detected(machine))
    fit = best_profile(machine, {}, [NamedProfile("it", "it", made)])
    assert fit is not None
    expected = ["tensorrt", "cuda", "cpu"] if machine["accelerators"] else ["cpu"]
    assert made.providers == expected
