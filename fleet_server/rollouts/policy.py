"""What a rollout does next: pure. Stages, stop rules, and the sentences that say why."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fleet_server.rollouts.schemas import RolloutState, RolloutStrategy, StopMetric, StopRule

TRANSITIONS: dict[RolloutState, frozenset[RolloutState]] = {
    RolloutState.AWAITING_APPROVAL: frozenset({RolloutState.RUNNING, RolloutState.STOPPED}),
    RolloutState.RUNNING: frozenset(
        {RolloutState.PAUSED, RolloutState.REVERTING, RolloutState.SUCCEEDED, RolloutState.STOPPED}
    ),
    RolloutState.PAUSED: frozenset({RolloutState.RUNNING, RolloutState.REVERTING, RolloutState.STOPPED}),
    RolloutState.REVERTING: frozenset({RolloutState.REVERTED, RolloutState.STOPPED}),
    RolloutState.SUCCEEDED: frozenset({RolloutState.REVERTING}),
    RolloutState.STOPPED: frozenset(),
    RolloutState.REVERTED: frozenset(),
}


class RolloutTransitionError(Exception):
    """A rollout was asked to go where the table does not lead; names both states."""

    def __init__(self, current: RolloutState, wanted: RolloutState) -> None:
        super().__init__(f"a rollout can't go from {current.value!r} to {wanted.value!r}")
        self.current = current
        self.wanted = wanted


def check_transition(current: RolloutState, wanted: RolloutState) -> RolloutState:
    """Return `wanted` when the table leads there.

    Raises:
        RolloutTransitionError: otherwise.
    """
    if wanted not in TRANSITIONS[current]:
        raise RolloutTransitionError(current, wanted)
    return wanted


def approval_refusal(creator_id: str, approver_ids: Sequence[str], principal_id: str) -> str | None:
    """Why a principal's approval of a rollout does not count, in a sentence; None when it does."""
    if principal_id == creator_id:
        return "who created a rollout can't approve it: ask another releaser"
    if principal_id in approver_ids:
        return "you approved it already: ask another releaser"
    return None


class Action(StrEnum):
    """What the engine does with a rollout now."""

    WAIT = "wait"
    ADVANCE = "advance"
    SUCCEED = "succeed"
    PAUSE = "pause"
    REVERT = "revert"
    FINISH_REVERT = "finish_revert"


@dataclass(frozen=True)
class Decision:
    """An action, and a sentence that says why."""

    action: Action
    reason: str


@dataclass(frozen=True)
class Measure:
    """A metric's value, and how many samples it comes from."""

    value: float
    samples: int


@dataclass(frozen=True)
class Snapshot:
    """A running rollout at one moment.

    Attributes:
        stage: index of the present stage.
        sent: deployments that were sent.
        settled: of those, how many are active or ended.
        failed: of those, how many failed or were rolled back by their device.
        offline: unsettled ones whose device is offline.
        settled_for_s: seconds since the stage's last deployment settled; None while one is unsettled.
        measures: what telemetry says, by metric.
    """

    stage: int
    sent: int
    settled: int
    failed: int
    offline: int
    settled_for_s: float | None
    measures: Mapping[StopMetric, Measure] = field(default_factory=dict)


def assign_stages(devices: Sequence[tuple[str, str]], strategy: RolloutStrategy) -> dict[str, int]:
    """The stage of each device.

    Stages are cumulative shares, rounded up; kinds of device take turns, so that the first stage has as many kinds as
    it has room for. The same devices give the same answer.

    Args:
        devices: `(device_id, profile name)` pairs.
        strategy: with the stages.
    """
    queues: dict[str, list[str]] = defaultdict(list)
    for device_id, profile in sorted(devices):
        queues[profile].append(device_id)
    order = [
        (position / len(ids), profile, device_id)
        for profile, ids in queues.items()
        for position, device_id in enumerate(ids)
    ]
    order.sort()
    stages = {}
    for rank, (_, _, device_id) in enumerate(order):
        stages[device_id] = next(
            index
            for index, stage in enumerate(strategy.stages)
            if rank < math.ceil(len(order) * stage.percent / 100 - 1e-9)
        )
    return stages


def decide(strategy: RolloutStrategy, snapshot: Snapshot) -> Decision:
    """What to do with a running rollout. A stop rule that holds comes before everything else."""
    for rule in strategy.stop_when:
        stopped = _stops(rule, snapshot)
        if stopped is not None:
            return Decision(Action.PAUSE if strategy.on_stop == "pause" else Action.REVERT, stopped)
    waiting = snapshot.sent - snapshot.settled
    if waiting:
        offline = f", {snapshot.offline} of them offline" if snapshot.offline else ""
        return Decision(Action.WAIT, f"{waiting} of {snapshot.sent} devices have not settled{offline}")
    soak = strategy.stages[snapshot.stage].soak_s
    watched = snapshot.settled_for_s or 0.0
    if watched < soak:
        return Decision(Action.WAIT, f"watched for {watched:.0f} of {soak:.0f} s")
    done = f"{snapshot.settled - snapshot.failed} of {snapshot.sent} devices run it"
    if snapshot.failed:
        done += f", {snapshot.failed} failed within the allowed share"
    if snapshot.stage + 1 < len(strategy.stages):
        return Decision(Action.ADVANCE, f"{done}; no stop rule held")
    return Decision(Action.SUCCEED, f"{done}; no stop rule held")


def _stops(rule: StopRule, snapshot: Snapshot) -> str | None:
    if rule.metric is StopMetric.FAILED_PERCENT:
        measure = Measure(100 * snapshot.failed / snapshot.sent if snapshot.sent else 0.0, snapshot.settled)
    else:
        found = snapshot.measures.get(rule.metric)
        if found is None:
            return None
        measure = found
    if measure.samples < rule.min_samples or measure.value <= rule.above:
        return None
    return f"{rule.metric.value} is {measure.value:.4g}, above {rule.above:g}, over {measure.samples} samples"
