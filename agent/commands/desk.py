"""The device's commands: which are begun, how those that go on are, and what the server is told.

A command's id is in the journal before anything is done, so a command that comes again, by a broker, a server or an
agent that started anew, is answered and not carried out again. Called by the supervisor's main loop only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from agent.commands.execution import Execution, Outcome, RefusedError
from agent.database import DatabaseError
from agent.protocol.commands import Command, CommandAnswer, CommandKind, CommandPhase

log = logging.getLogger("agent.commands")
MOST = 8  # that go on at the same time
MOST_READERS = 3  # of the log
# Done twice they cost little: they are carried out also where it can't be written down that they were.
HARMLESS = frozenset({CommandKind.LOGS, CommandKind.FACTS, CommandKind.IDENTIFY, CommandKind.BENCHMARK})
Start = Callable[[Command, float], Execution]


@dataclass
class _Running:
    kind: CommandKind
    execution: Execution
    until: float


class Book(Protocol):
    """Which commands were acted on."""

    @property
    def lasts(self) -> bool:
        """Whether what is noted now is known after a restart."""
        ...

    def answer(self, command_id: str) -> CommandAnswer | None:
        """What was last said of a command; None for one that is new."""
        ...

    def note(self, answer: CommandAnswer) -> None:
        """A command has come so far.

        Raises:
            DatabaseError: when it can't be written; it is known until the agent ends.
        """
        ...


class CommandDesk:
    """Takes commands.

    Args:
        book: which were acted on.
        allowed: by the name of each command, whether the device's owner allows it.
        starters: how each is begun; they raise `RefusedError` where it can't be.
        say: says an answer to the server; false when there is no link.
    """

    def __init__(
        self,
        book: Book,
        allowed: Mapping[str, bool],
        starters: Mapping[CommandKind, Start],
        say: Callable[[CommandAnswer], bool],
    ) -> None:
        self._book = book
        self._allowed = allowed
        self._starters = starters
        self._say = say
        self._running: dict[str, _Running] = {}

    def received(self, command: Command, now: float, wall: float) -> None:
        """Begin a command, leave one off, or say again what became of it.

        Args:
            command: as the server sent it.
            now: of a clock that is never set, in seconds.
            wall: Unix seconds.
        """
        known = self._book.answer(command.command_id)
        if command.cancel and (known is None or command.command_id in self._running):
            self._cancel(command.command_id)
        elif known is not None:
            self._say(known)
        elif not command.cancel:
            self._begin(command, now, wall)

    @property
    def busy(self) -> bool:
        """Whether a command is carried out."""
        return bool(self._running)

    def tick(self, now: float) -> None:
        """Let those that go on go on.

        Raises:
            DatabaseError: when it can't be written how they ended; the server is told all the same.
        """
        for command_id, running in list(self._running.items()):
            outcome = self._step(command_id, running, now)
            if outcome is not None:
                del self._running[command_id]
                self._finish(command_id, outcome)

    def stop(self) -> None:
        """The agent ends: what goes on is left off, and has failed when the agent starts again."""
        for running in self._running.values():
            running.execution.end()
        self._running.clear()

    def _step(self, command_id: str, running: _Running, now: float) -> Outcome | None:
        try:
            outcome = running.execution.step(now)
            if outcome is None and now >= running.until:
                outcome = running.execution.end() or Outcome(
                    CommandPhase.TIMED_OUT, "timeout", "it took longer than it might: give it more time (timeout_s)"
                )
        except Exception as error:
            log.exception("command %s failed", command_id)
            running.execution.end()
            return Outcome(CommandPhase.FAILED, "internal", f"{type(error).__name__}: {str(error)[:500]}")
        return outcome

    def _begin(self, command: Command, now: float, wall: float) -> None:
        try:
            kind = self._check(command, wall)
            lasts = self._note(CommandAnswer(command.command_id, CommandPhase.RUNNING))
            if not lasts and kind not in HARMLESS:
                detail = "it can't be written down that it was begun, and it might be done twice: mend the disk first"
                raise RefusedError("store_error", detail)  # noqa: TRY301
            log.warning("command %s: %s", command.command_id, kind.value)
            execution = self._starters[kind](command, now)
        except RefusedError as error:
            log.warning("command %s (%s) is refused: %s", command.command_id, command.kind, error.detail)
            self._finish(command.command_id, Outcome(CommandPhase.REFUSED, error.code, error.detail))
            return
        self._running[command.command_id] = _Running(kind, execution, now + command.timeout_s)
        self._say(CommandAnswer(command.command_id, CommandPhase.RUNNING))

    def _check(self, command: Command, wall: float) -> CommandKind:
        """What kind it is, where it may be begun.

        Raises:
            RefusedError: otherwise.
        """
        try:
            kind = CommandKind(command.kind)
        except ValueError:
            detail = f"this agent knows no command {command.kind[:64]!r}: upgrade it"
            raise RefusedError("unknown_command", detail) from None
        if not self._allowed.get(kind.value, False):
            key = kind.value.replace("-", "_")
            raise RefusedError("not_allowed", f"the device's owner does not allow it (commands.{key} = false)")
        if wall > command.expires_at:
            detail = f"it came {wall - command.expires_at:.0f} s late by this device's clock: send another, or set that"
            raise RefusedError("expired", detail)
        of_kind = sum(one.kind is kind for one in self._running.values())
        if len(self._running) >= MOST or of_kind >= (MOST_READERS if kind is CommandKind.LOGS else 1):
            raise RefusedError("busy", "the device still carries out such a command: wait, or cancel that")
        return kind

    def _cancel(self, command_id: str) -> None:
        running = self._running.pop(command_id, None)
        if running is not None:
            running.execution.end()
        self._finish(command_id, Outcome(CommandPhase.CANCELLED, "cancelled", "it was cancelled"))

    def _note(self, answer: CommandAnswer) -> bool:
        """Write it down; whether it is known after a restart."""
        try:
            self._book.note(answer)
        except DatabaseError as error:
            log.warning("it can't be written down what became of command %s: %s", answer.command_id, error.detail)
            return False
        return self._book.lasts

    def _finish(self, command_id: str, outcome: Outcome) -> None:
        answer = CommandAnswer(command_id, outcome.phase, outcome.code, outcome.detail, outcome.result)
        self._note(answer)
        self._say(answer)
