"""Profiles of devices with tflite-runtime: only what runs rightly there is converted for them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fleet_server.cli.profiles import detected
from fleet_server.devices.matching import matches
from fleet_server.devices.schemas import ProfileSpec

FACTS: dict[str, Any] = {
    "arch": "aarch64",
    "cpu_features": ["asimd"],
    "memory_mb": 1024,
    "accelerators": [],
    "runtimes": [{"name": "litert", "package": "tflite-runtime", "version": "2.14.0", "providers": ["xnnpack"]}],
}


def profile(**changed: Any) -> dict[str, Any]:
    return {"runtime": "litert", "match": {"runtimes.litert.package": "tflite-runtime"}, **changed}


@pytest.mark.parametrize("precision", ["dynamic-int8", "int16", "weight-int8", "weight-int4", "fp16"])
def test_what_it_runs_wrongly_is_refused(precision: str) -> None:
    with pytest.raises(ValidationError, match=f"runs {precision} wrongly"):
        ProfileSpec.model_validate(profile(precisions=["fp32", precision]))
    other = profile(match={"runtimes.litert.package": "ai-edge-litert"}, precisions=["fp32", precision])
    ProfileSpec.model_validate(other)


def test_such_devices_match_and_others_do_not() -> None:
    spec = ProfileSpec.model_validate(profile())
    assert [one.value for one in spec.precisions] == ["fp32", "int8"]
    assert matches(FACTS, spec)
    fresh = {**FACTS, "runtimes": [{**FACTS["runtimes"][0], "package": "ai-edge-litert"}]}
    assert not matches(fresh, spec)


def test_a_detected_profile_says_it() -> None:
    made = detected(FACTS)
    assert made["precisions"] == ["fp32", "int8"]
    assert made["match"]["runtimes.litert.package"] == "tflite-runtime"
    made.pop("name")
    assert matches(FACTS, ProfileSpec.model_validate(made))
