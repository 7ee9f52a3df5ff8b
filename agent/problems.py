"""What went wrong on the device itself and was lived through: kept, counted, and told to the server: pure.

A deployment's failure is the deployment's; this is for what belongs to none. Times are those of the device's clock,
which may be wrong.
"""

from __future__ import annotations

import msgspec

from agent.protocol.limits import LIMITS
from agent.protocol.messages import Problem

CLOCK_SLACK_S = 60.0

JOURNAL_LOST = "journal_lost"
SPOOL_LOST = "spool_lost"
STAND_IN = "stand_in"
TELEMETRY_DROPPED = "telemetry_dropped"
WORKER_ENDED = "worker_ended"
WORKER_HUNG = "worker_hung"
WORKER_NOT_STARTED = "worker_not_started"
GRPC_NOT_SERVED = "grpc_not_served"
CLOCK_SET = "clock_set"
OFFLINE = "offline"
ENSEMBLE_UNSERVABLE = "ensemble_unservable"
PIPELINE_FAILED = "pipeline_failed"
PIPELINE_REFUSED = "pipeline_refused"
PIPELINE_UNDELIVERED = "pipeline_undelivered"
PIPELINE_DROPPED = "pipeline_dropped"


class Problems:
    """The newest problems, one a code and subject.

    Args:
        kept: what `packed` gave earlier; what can't be read is left out.

    Attributes:
        changed: something is to be kept and reported; the caller clears it.
    """

    def __init__(self, kept: bytes = b"") -> None:
        self._found: dict[tuple[str, str], Problem] = {}
        self.changed = False
        try:
            pairs = msgspec.json.decode(kept, type=list[tuple[str, Problem]]) if kept else []
        except (msgspec.MsgspecError, UnicodeDecodeError):
            pairs = []
        for subject, problem in pairs[-LIMITS.problems :]:
            # What held when the agent ended has to show itself anew.
            self._found[problem.code, subject] = msgspec.structs.replace(problem, ongoing=False)

    def note(
        self,
        code: str,
        detail: str,
        at: float,
        *,
        subject: str = "",
        count: int = 1,
        ongoing: bool = False,
        retold: bool = False,
    ) -> None:
        """Something went wrong.

        Args:
            code: which kind of thing.
            detail: a sentence for people.
            at: now, in Unix seconds.
            subject: of several of one kind, which.
            count: how often at once.
            ongoing: it holds until `over` is called.
            retold: another detail of what goes on is news.
        """
        at = min(max(at, 0.0), LIMITS.unix_seconds)
        text = detail.replace("\0", "?")[: LIMITS.detail_chars]
        before = self._found.pop((code, subject), None) or Problem(code, text, at, at, count=0)
        fresh = not (ongoing and before.ongoing)
        total = min(before.count + count, LIMITS.counter - 1) if fresh else before.count
        self._found[code, subject] = Problem(code, text, before.first_at, at, total, ongoing)
        while len(self._found) > LIMITS.problems:
            del self._found[next(iter(self._found))]
        self.changed |= fresh or (retold and before.detail != text)

    def over(self, code: str, *, subject: str = "") -> None:
        """What was ongoing is no more."""
        before = self._found.get((code, subject))
        if before is not None and before.ongoing:
            self._found[code, subject] = msgspec.structs.replace(before, ongoing=False)
            self.changed = True

    def reports(self) -> tuple[Problem, ...]:
        """All of them, the newest last."""
        return tuple(self._found.values())

    def packed(self) -> bytes:
        """All of them, to be kept."""
        return msgspec.json.encode([(subject, problem) for (_, subject), problem in self._found.items()])


class ClockWatch:
    """Finds out when somebody sets the clock.

    Args:
        wall: Unix seconds.
        steady: seconds of a clock that is never set.
    """

    def __init__(self, wall: float, steady: float) -> None:
        self._offset = wall - steady

    def tick(self, wall: float, steady: float) -> float:
        """By how many seconds the clock was set since the last time; 0 for what is only drift."""
        moved = wall - steady - self._offset
        if abs(moved) < CLOCK_SLACK_S:
            return 0.0
        self._offset += moved
        return moved
