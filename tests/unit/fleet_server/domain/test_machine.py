"""The state machine of a rollout: what it decides, and that no order of events makes it do what it must not."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_server.domain.machine import (
    Action,
    Allowance,
    Candidate,
    Picture,
    Underway,
    choose,
    decide,
    rate_now,
    refill,
)
from fleet_server.domain.rules import Outcomes, judge_counted
from fleet_server.domain.stages import Member, assign_stages
from fleet_server.domain.strategy import Rate, RolloutStrategy

TWO = {"stages": [{"percent": 50, "soak_s": 10}, {"percent": 100}]}
DONE = Picture(stage=0, sent=2, settled=2, active=2, failed=0, settled_for_s=11)


def strategy(**fields: Any) -> RolloutStrategy:
    return RolloutStrategy.model_validate({**TWO, **fields})


@pytest.mark.parametrize(
    ("changes", "action", "reason"),
    [
        ({}, Action.ADVANCE, "2 of 2 devices run it; no stop rule held"),
        ({"settled": 1, "offline": 1}, Action.WAIT, "1 of 2 devices have not settled, 1 of them offline"),
        ({"settled_for_s": 1}, Action.WAIT, "watched for 1 of 10 s"),
        ({"due": 3}, Action.WAIT, "3 devices of this stage wait for its rate or a cap"),
        ({"due": 3, "differences": True}, Action.WAIT, "for a difference, its rate or a cap"),
        ({"retries": 1}, Action.WAIT, "1 devices that failed will be tried again"),
        ({"stage": 1}, Action.SUCCEED, "2 of 2 devices run it"),
        ({"stage": 1, "active": 0}, Action.STOP, "no device of it is left"),
        ({"sent": 0, "settled": 0, "active": 0, "held": 2}, Action.ADVANCE, "2 are held"),
        ({"failed": 1, "active": 1}, Action.ADVANCE, "1 failed within the allowed share"),
    ],
)
def test_decisions(changes: dict[str, Any], action: Action, reason: str) -> None:
    found = decide(strategy(), replace(DONE, **changes))
    assert (found.action, reason in found.reason) == (action, True), found.reason


@pytest.mark.parametrize(("on_stop", "action"), [("pause", Action.PAUSE), ("revert", Action.REVERT)])
def test_a_rule_that_holds_comes_first(on_stop: str, action: Action) -> None:
    plan = strategy(on_stop=on_stop, stop_when=[{"metric": "failed_percent", "above": 5}])
    standing = judge_counted(plan.stop_when[0], {"p": Outcomes(2, 1, failed=1, rolled_back=0)})
    found = decide(plan, replace(DONE, settled=1, standings=[standing]))
    assert (found.action, found.reason) == (action, standing.reason)


def test_a_stage_may_wait_for_somebody_and_a_rollout_for_its_deadline() -> None:
    plan = strategy(stages=[{"percent": 50}, {"percent": 100, "approval": True}], deadline_s=60)
    assert "stage 2 begins when somebody lets it" in decide(plan, DONE).reason
    assert decide(plan, replace(DONE, let_on=1)).action is Action.ADVANCE
    late = decide(plan, replace(DONE, age_s=61))
    assert late.action is Action.PAUSE
    assert "past its deadline of 60 s: stage 2 begins" in late.reason
    assert decide(plan, replace(DONE, age_s=61, let_on=1)).action is Action.ADVANCE, "it waits for nothing"


def test_rates_grow_with_what_runs_well() -> None:
    rate = Rate(per_minute=6, growth=2, after_active=10, at_most_per_minute=40)
    assert [rate_now(rate, active) for active in (0, 9, 10, 20, 30, 10_000)] == [6, 6, 12, 24, 40, 40]
    allowance = Allowance(1.0, 0.0)
    assert refill(allowance, 6, 10).tokens == 1.0, "no more than one at once, of so slow a rate"
    assert refill(Allowance(0.0, 0.0), 6, 5).tokens == 0.5
    assert refill(Allowance(0.0, 0.0), 600, 3600).tokens == 100.0
    assert refill(Allowance(0.4, 9.0), 6, 5).tokens == 0.4, "a clock that was set back takes nothing away"


def test_caps_hold_for_all_and_for_each_value() -> None:
    plan = strategy(caps={"at_once": 3, "tag": "site", "per_value": 1})
    waiting = [Candidate("a1", "a"), Candidate("a2", "a"), Candidate("b1", "b"), Candidate("n1"), Candidate("n2")]
    assert choose(plan, waiting, Underway(), 10) == ["a1", "b1", "n1"]
    assert choose(plan, waiting, Underway(1, {"a": 1}), 10) == ["b1", "n1"]
    assert choose(plan, waiting, Underway(3), 10) == []
    assert choose(plan, waiting, Underway(), 1) == ["a1"]


@dataclass
class Fleet:
    """A rollout in memory, carried out by the same rules as the real one."""

    plan: RolloutStrategy
    members: list[Member]
    chance: random.Random
    stage: int = 0
    phases: dict[str, str] = field(default_factory=dict)
    sent_in: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stages = assign_stages(self.members, self.plan, "seed")
        self.sites = {one.device_id: one.tags["site"] for one in self.members}
        self.phases = dict.fromkeys(self.stages, "scheduled")

    def under_way(self) -> list[str]:
        return [device for device, phase in self.phases.items() if phase == "pending"]

    def picture(self) -> Picture:
        sent = [phase for phase in self.phases.values() if phase != "scheduled"]
        settled = [phase for phase in sent if phase != "pending"]
        failed = sum(phase == "failed" for phase in settled)
        due = sum(self.phases[device] == "scheduled" and stage <= self.stage for device, stage in self.stages.items())
        outcomes = {"p": Outcomes(len(sent), len(settled), failed, 0)}
        standings = [judge_counted(rule, outcomes) for rule in self.plan.stop_when]
        return Picture(
            self.stage, len(sent), len(settled), len(settled) - failed, failed, due=due,
            settled_for_s=1e9, standings=standings,
        )  # fmt: skip

    def send(self) -> None:
        waiting = [
            Candidate(device, self.sites[device])
            for device, stage in self.stages.items()
            if self.phases[device] == "scheduled" and stage <= self.stage
        ]
        by_value = Counter(self.sites[device] for device in self.under_way())
        for device in choose(self.plan, waiting, Underway(by_value.total(), by_value), self.chance.randint(0, 4)):
            assert device not in self.sent_in, "sent twice"
            self.sent_in[device] = self.stage
            self.phases[device] = "pending"

    def settle_one(self, bad: float) -> None:
        waiting = self.under_way()
        if waiting:
            device = self.chance.choice(waiting)
            self.phases[device] = "failed" if self.chance.random() < bad else "active"


@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 99), unique=True, max_size=3),
    st.sampled_from([0.0, 0.02, 0.5]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(),
)
@settings(max_examples=150, deadline=None)
def test_whatever_happens(
    devices: int, percents: list[int], bad: float, at_once: int, per_site: int, seed: int
) -> None:
    """No device before its stage, none twice, never more at once than the caps say, and always an end."""
    plan = RolloutStrategy.model_validate(
        {
            "stages": [{"percent": percent} for percent in [*sorted(percents), 100]],
            "caps": {"at_once": at_once, "tag": "site", "per_value": per_site},
            "stop_when": [{"metric": "failed_percent", "above": 10, "min_samples": 3}],
        }
    )
    members = [Member(f"d{number}", "p", {"site": f"s{number % 4}"}) for number in range(devices)]
    fleet = Fleet(plan, members, random.Random(seed))
    for _ in range(100 * devices + 500):
        found = decide(plan, fleet.picture())
        if found.action is Action.WAIT:
            fleet.send()
        elif found.action is Action.ADVANCE:
            fleet.stage += 1
        else:
            break
        assert len(fleet.under_way()) <= at_once
        assert max(Counter(fleet.sites[one] for one in fleet.under_way()).values(), default=0) <= per_site
        fleet.settle_one(bad)
    else:
        pytest.fail("it never ends")
    assert all(fleet.stages[device] <= stage for device, stage in fleet.sent_in.items())
    if found.action is Action.SUCCEED:
        assert "scheduled" not in fleet.phases.values()
        assert not fleet.under_way()
    else:
        assert found.action in {Action.REVERT, Action.STOP}
        assert "failed" in fleet.phases.values()
