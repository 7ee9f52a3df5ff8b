"""Where a rollout can be, and where it can go from there."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class RolloutState(StrEnum):
    """Where a rollout is."""

    AWAITING_APPROVAL = "awaiting_approval"  # nothing is sent before others than its creator approved it
    RUNNING = "running"
    PAUSED = "paused"  # by a person, by a stop rule with on_stop=pause, or by its deadline
    REVERTING = "reverting"  # a stop rule or an abort takes devices back to what they ran before
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"  # ended without reverting, or after reverting: `verdicts` says which
    REVERTED = "reverted"


TRANSITIONS: dict[RolloutState, frozenset[RolloutState]] = {
    RolloutState.AWAITING_APPROVAL: frozenset({RolloutState.RUNNING, RolloutState.STOPPED}),
    RolloutState.RUNNING: frozenset(
        {RolloutState.PAUSED, RolloutState.REVERTING, RolloutState.SUCCEEDED, RolloutState.STOPPED}
    ),
    RolloutState.PAUSED: frozenset({RolloutState.RUNNING, RolloutState.REVERTING, RolloutState.STOPPED}),
    RolloutState.REVERTING: frozenset({RolloutState.REVERTED, RolloutState.STOPPED}),
    RolloutState.SUCCEEDED: frozenset({RolloutState.RUNNING, RolloutState.REVERTING}),
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
