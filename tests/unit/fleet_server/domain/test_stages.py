"""Which device comes when."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fleet_server.domain.stages import Member, assign_stages, in_order, late_stage
from fleet_server.domain.strategy import RolloutStrategy


def strategy(*stages: dict[str, Any], **fields: Any) -> RolloutStrategy:
    return RolloutStrategy.model_validate({"stages": list(stages), **fields})


MEMBERS = [Member(f"a{i}", "arm") for i in range(5)] + [Member(f"b{i}", "x86", {"ring": "1"}) for i in range(5)]


def test_stages_round_up_and_mix_profiles() -> None:
    stages = assign_stages(MEMBERS, strategy({"percent": 20}, {"percent": 100}), "r")
    first = [device for device, stage in stages.items() if stage == 0]
    assert sorted(device[0] for device in first) == ["a", "b"]
    assert list(stages) == list(assign_stages(list(reversed(MEMBERS)), strategy({"percent": 100}), "r"))
    orders = {tuple(assign_stages(MEMBERS, strategy({"percent": 100}), f"r{number}")) for number in range(20)}
    assert len(orders) > 10, "another rollout, another order"


def test_stages_by_count_and_by_tag() -> None:
    found = assign_stages(MEMBERS, strategy({"count": 1}, {"count": 3}, {"percent": 100}), "r")
    assert [list(found.values()).count(stage) for stage in range(3)] == [1, 2, 7]
    ordered = in_order(MEMBERS, strategy({"percent": 100}, order={"tag": "ring", "first": ["1"]}).order, "r")
    assert [member.profile for member in ordered] == ["x86"] * 5 + ["arm"] * 5


@given(st.integers(1, 200), st.integers(1, 99), st.integers(0, 50))
def test_every_device_has_one_stage_and_the_share_is_kept(devices: int, percent: int, seed: int) -> None:
    members = [Member(f"d{number}", f"p{number % 3}") for number in range(devices)]
    found = assign_stages(members, strategy({"percent": percent}, {"percent": 100}), str(seed))
    assert sorted(found) == sorted(member.device_id for member in members)
    first = sum(stage == 0 for stage in found.values())
    assert first == -(-devices * percent // 100)


def test_late_devices_come_with_the_open_stage_or_later() -> None:
    plan = strategy({"percent": 10}, {"percent": 50}, {"percent": 100})
    for present in range(3):
        stages = [late_stage(f"d{n}", plan, "r", present=present, total=100) for n in range(300)]
        assert min(stages) == present
        assert max(stages) == 2
    early = [late_stage(f"d{n}", plan, "r", present=0, total=100) for n in range(1000)]
    assert 60 <= early.count(0) <= 140


@pytest.mark.parametrize(
    "fields",
    [
        {"stages": [{"percent": 50}]},
        {"stages": [{"percent": 50}, {"percent": 40}, {"percent": 100}]},
        {"stages": [{"count": 5}, {"count": 5}, {"percent": 100}]},
        {"stages": [{"percent": 10, "count": 3}, {"percent": 100}]},
        {"stages": [{"percent": 100, "approval": True}]},
        {"order": {"tag": "ring"}},
        {"caps": {"tag": "site"}},
        {"rate": {"per_minute": 10, "at_most_per_minute": 5}},
        {"wat": 1},
    ],
)
def test_strategies_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RolloutStrategy.model_validate(fields)
