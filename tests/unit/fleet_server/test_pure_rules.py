"""The server's pure rules: matching and scores."""

from __future__ import annotations

import pytest

from fleet_server.devices.matching import NamedProfile, best_profile, matches
from fleet_server.devices.schemas import ProfileSpec
from fleet_server.telemetry.metrics import scores

FACTS = {
    "arch": "aarch64",
    "cpu_features": ["asimddp", "neon"],
    "memory_mb": 3800,
    "runtimes": [{"name": "onnx", "version": "1.32.0", "providers": ["cpu"]}],
    "accelerators": [{"kind": "cuda", "name": "Orin"}],
    "tags": {"site": "plant7"},
}


@pytest.mark.parametrize(
    ("match", "holds"),
    [
        ({}, True),
        ({"arch": "aarch64"}, True),
        ({"arch": "x86_64"}, False),
        ({"arch": ["x86_64", "aarch64"]}, True),
        ({"cpu_features": "asimddp"}, True),
        ({"cpu_features": "avx2"}, False),
        ({"memory_mb": {"min": 2048}}, True),
        ({"memory_mb": {"min": 8000}}, False),
        ({"tags.site": "plant7"}, True),
        ({"runtimes.onnx.version": "1.32.0"}, True),
        ({"accelerators.kind": "cuda"}, True),
        ({"accelerators.kind": "edgetpu"}, False),
        ({"nothing.there": 1}, False),
    ],
)
def test_matching(match: dict[str, object], holds: bool) -> None:
    assert matches(FACTS, ProfileSpec.model_validate({"match": match, "runtime": "onnx"})) is holds


def test_a_device_without_the_runtime_never_matches() -> None:
    assert not matches(FACTS, ProfileSpec.model_validate({"match": {}, "runtime": "litert"}))


def test_the_most_specific_profile_wins_and_people_overlay_tags() -> None:
    def named(name: str, match: dict[str, object]) -> NamedProfile:
        return NamedProfile(name, name, ProfileSpec.model_validate({"match": match, "runtime": "onnx"}))

    profiles = [named("any", {}), named("jetson", {"arch": "aarch64", "tags.site": "plant8"})]
    assert best_profile(FACTS, {}, profiles) is profiles[0]
    assert best_profile(FACTS, {"site": "plant8"}, profiles) is profiles[1]


def test_scores_by_hand() -> None:
    found = scores([(0, 0, 8), (0, 1, 2), (1, 1, 5), (1, 0, 5)])
    assert found.accuracy == 13 / 20
    assert found.macro_recall == pytest.approx((0.8 + 0.5) / 2)
    assert found.macro_precision == pytest.approx((8 / 13 + 5 / 7) / 2)
    assert found.macro_f1 == pytest.approx((16 / 23 + 10 / 17) / 2)
    assert scores([]).accuracy is None
