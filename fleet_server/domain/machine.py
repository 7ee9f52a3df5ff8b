"""The state machine of a rollout: from a picture of it and the time to what is done now, and why.

`decide` says where a rollout goes, `choose` which devices are told. Neither reads or writes anything: whoever carries
out what they say does it in one transaction with what they saw, so a server that dies in between has done nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fleet_server.domain.rules import Standing
from fleet_server.domain.strategy import Rate, RolloutStrategy

BURST_S = 10.0  # of a rate may be sent at once


class Action(StrEnum):
    """What the engine does with a rollout now."""

    WAIT = "wait"
    ADVANCE = "advance"
    SUCCEED = "succeed"
    STOP = "stop"
    PAUSE = "pause"
    REVERT = "revert"


@dataclass(frozen=True)
class Decision:
    """An action, and a sentence that says why."""

    action: Action
    reason: str


@dataclass(frozen=True)
class Picture:
    """A running rollout at one moment.

    Attributes:
        stage: index of the present stage.
        due: deployments of open stages that were not sent yet, held ones not counted.
        held: of open stages, whose device is held back.
        sent: deployments that were sent.
        settled: of those, how many are active or ended.
        active: of those, how many run the version.
        failed: of those, how many failed or were rolled back by their device.
        retries: failed ones that will be tried again.
        exposed: unsettled ones that run the version beside the one before.
        offline: unsettled ones whose device is offline.
        settled_for_s: seconds since the last one settled; None while one is unsettled.
        age_s: seconds since it began.
        let_on: the highest stage that somebody let begin.
        standings: where the stop rules stand.
        differences: how many of those due wait for a difference to be made.
    """

    stage: int
    sent: int
    settled: int
    active: int
    failed: int
    due: int = 0
    held: int = 0
    retries: int = 0
    exposed: int = 0
    offline: int = 0
    settled_for_s: float | None = None
    age_s: float = 0.0
    let_on: int = 0
    standings: Sequence[Standing] = ()
    differences: int = 0


def decide(strategy: RolloutStrategy, picture: Picture) -> Decision:
    """What to do with a running rollout. A stop rule that holds comes before everything else."""
    for standing in picture.standings:
        if standing.stops:
            return Decision(Action.PAUSE if strategy.on_stop == "pause" else Action.REVERT, standing.reason)
    waits = _waits(strategy, picture)
    if waits is not None:
        if strategy.deadline_s is not None and picture.age_s > strategy.deadline_s:
            return Decision(Action.PAUSE, f"it is past its deadline of {strategy.deadline_s:g} s: {waits}")
        return Decision(Action.WAIT, waits)
    done = f"{picture.active} of {picture.sent} devices run it"
    if picture.failed:
        done += f", {picture.failed} failed within the allowed share"
    if picture.held:
        done += f", {picture.held} are held"
    if picture.stage + 1 < len(strategy.stages):
        return Decision(Action.ADVANCE, f"{done}; no stop rule held")
    if not picture.active:
        return Decision(Action.STOP, "no device of it is left to run it")
    return Decision(Action.SUCCEED, f"{done}; no stop rule held")


def _waits(strategy: RolloutStrategy, picture: Picture) -> str | None:
    """Why the present stage is not over, in a sentence; None when it is and the next may begin."""
    unsettled = picture.sent - picture.settled
    if picture.due:
        why = " for a difference, its rate or a cap" if picture.differences else " for its rate or a cap"
        return f"{picture.due} devices of this stage wait{why}; {unsettled} have not settled"
    if unsettled:
        offline = f", {picture.offline} of them offline" if picture.offline else ""
        beside = f", {picture.exposed} of them run it beside the version before" if picture.exposed else ""
        return f"{unsettled} of {picture.sent} devices have not settled{offline}{beside}"
    if picture.retries:
        return f"{picture.retries} devices that failed will be tried again"
    soak = strategy.stages[picture.stage].soak_s
    watched = picture.settled_for_s or 0.0
    if watched < soak and picture.sent:
        return f"watched for {watched:.0f} of {soak:.0f} s"
    following = picture.stage + 1
    if following < len(strategy.stages) and strategy.stages[following].approval and picture.let_on < following:
        return f"stage {following + 1} begins when somebody lets it: `shoal rollout promote`"
    return None


@dataclass(frozen=True)
class Allowance:
    """What a rate still allows.

    Attributes:
        tokens: devices that may be sent now.
        at: when that was so, in seconds of any clock.
    """

    tokens: float = 1.0
    at: float = 0.0


def refill(allowance: Allowance, per_minute: float, now: float) -> Allowance:
    """What a rate allows by now; no more than ten seconds' worth is kept, and always one device."""
    gained = max(now - allowance.at, 0.0) * per_minute / 60
    return Allowance(min(allowance.tokens + gained, max(1.0, per_minute * BURST_S / 60)), now)


def rate_now(rate: Rate, active: int) -> float:
    """Devices a minute, when so many run the version."""
    steps = min(active // rate.after_active, 200)
    return min(rate.per_minute * rate.growth**steps, rate.at_most_per_minute)


@dataclass(frozen=True)
class Candidate:
    """A deployment that may be sent: its id, and its device's value of the tag that has a cap."""

    deployment_id: str
    value: str = ""


@dataclass(frozen=True)
class Underway:
    """Deployments that were sent and have not settled."""

    total: int = 0
    by_value: Mapping[str, int] = field(default_factory=dict)


def choose(strategy: RolloutStrategy, candidates: Sequence[Candidate], underway: Underway, tokens: int) -> list[str]:
    """Which of the candidates are sent now, in their order: those that fit under the caps and the rate.

    Args:
        strategy: with the caps.
        candidates: of open stages, in the order in which they come.
        underway: what counts against the caps already.
        tokens: how many the rate allows.
    """
    caps = strategy.caps
    room = tokens if caps.at_once is None else min(tokens, caps.at_once - underway.total)
    taken = Counter(underway.by_value)
    chosen: list[str] = []
    for one in candidates:
        if len(chosen) >= room:
            break
        if caps.per_value is not None and one.value:
            if taken[one.value] >= caps.per_value:
                continue
            taken[one.value] += 1
        chosen.append(one.deployment_id)
    return chosen
