"""`logs`: the newest records, then those that come, in batches that are bounded in number, size and pace."""

from __future__ import annotations

from collections.abc import Callable

from agent.commands.execution import Outcome
from agent.commands.ring import LogRing
from agent.protocol.commands import CommandAnswer, CommandArguments, CommandPhase, CommandResult
from agent.protocol.limits import LIMITS

EVERY_S = 0.5


class Following:
    """One who reads the log.

    Args:
        command_id: as asked.
        given: how many lines, of what level, and whether to follow.
        ring: the log.
        say: says a batch to the server; false when there is no link, then it is said again.
    """

    def __init__(
        self, command_id: str, given: CommandArguments, ring: LogRing, say: Callable[[CommandAnswer], bool]
    ) -> None:
        self._command_id, self._given, self._ring, self._say = command_id, given, ring, say
        self._after = ring.newest(given.lines, given.level)
        self._sent, self._dropped, self._next_at = 0, 0, 0.0

    def step(self, now: float) -> Outcome | None:
        """Send what is there; where nobody follows, the end comes with the last of it."""
        if now < self._next_at:
            return None
        self._next_at = now + EVERY_S
        lines, after, gone = self._ring.after(self._after, self._given.level, LIMITS.log_batch)
        dropped = self._dropped + gone
        if lines or dropped:
            batch = CommandAnswer(self._command_id, CommandPhase.RUNNING, lines=tuple(lines), dropped=dropped)
            if not self._say(batch):
                return None
        self._after, self._dropped, self._sent = after, 0, self._sent + len(lines)
        full = len(lines) == LIMITS.log_batch
        return None if self._given.follow or full else self._outcome()

    def end(self) -> Outcome | None:
        """Whoever followed until the time was over has got what there was."""
        return self._outcome() if self._given.follow else None

    def _outcome(self) -> Outcome:
        return Outcome(CommandPhase.SUCCEEDED, result=CommandResult(lines=self._sent))
