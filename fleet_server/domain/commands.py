"""Where a command to a device can be, and where it can go from there. Pure.

    queued → sent → running → succeeded | failed | timed_out | cancelled
       └───────┴→ refused

`queued` means that its device is away, `sent` that it is on its way. `refused` means that it was not begun: by the
server, because the device can't, or by the device. An end is an end: what a device says after it changes nothing.
"""

from __future__ import annotations

from enum import StrEnum

from agent.protocol.commands import CommandPhase


class CommandState(StrEnum):
    """Where a command is."""

    QUEUED = "queued"
    SENT = "sent"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    REFUSED = "refused"


_ENDS = frozenset({CommandState.SUCCEEDED, CommandState.FAILED, CommandState.TIMED_OUT, CommandState.CANCELLED})

TRANSITIONS: dict[CommandState, frozenset[CommandState]] = {
    CommandState.QUEUED: frozenset({CommandState.SENT, CommandState.RUNNING, CommandState.REFUSED}) | _ENDS,
    CommandState.SENT: frozenset({CommandState.RUNNING, CommandState.REFUSED}) | _ENDS,
    CommandState.RUNNING: _ENDS,
    **{state: frozenset() for state in (*_ENDS, CommandState.REFUSED)},
}
ENDED = frozenset(state for state, following in TRANSITIONS.items() if not following)
OPEN = frozenset(CommandState) - ENDED


class CommandTransitionError(Exception):
    """A command was asked to go where the table does not lead; names both states."""

    def __init__(self, current: CommandState, wanted: CommandState) -> None:
        super().__init__(f"a command can't go from {current.value!r} to {wanted.value!r}")
        self.current = current
        self.wanted = wanted


def check_transition(current: CommandState, wanted: CommandState) -> CommandState:
    """Return `wanted` when the table leads there.

    Raises:
        CommandTransitionError: otherwise.
    """
    if wanted not in TRANSITIONS[current]:
        raise CommandTransitionError(current, wanted)
    return wanted


def after_answer(current: CommandState, said: CommandPhase) -> CommandState:
    """Where a command is after its device said something: an end stays, and what is running is not queued again.

    A device that has lost its journal refuses what it had begun as expired: then it has failed.
    """
    if current in ENDED:
        return current
    wanted = CommandState(said.value)
    if current is CommandState.RUNNING and wanted is CommandState.REFUSED:
        return CommandState.FAILED
    return current if wanted is current else check_transition(current, wanted)
