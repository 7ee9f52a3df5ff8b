"""Notices an inference worker that hangs, whether or not a version is watched: pure.

A worker hangs when one inference of a model goes on for longer than any may, or when it answers no question for as
long. That a request waits behind others is no hanging: it will be its turn.
"""

from __future__ import annotations

from agent.serving.ipc import Peeked

ASK_S = 5.0
IDLE_ASK_S = 15.0  # while no inference goes on: each question wakes two processes
FEWEST_ASKS = 3  # without an answer; time alone may be the supervisor's own, of a machine that slept


class Watchdog:
    """Of one worker after the other. The clock is passed in, in seconds.

    Args:
        limit_s: how long one inference may take, and the worker may answer nothing; 0: for ever.

    Attributes:
        every_s: how often it must be looked at, in seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.every_s = min(ASK_S, limit_s / (FEWEST_ASKS + 1)) if limit_s else ASK_S
        self._idle_s = min(IDLE_ASK_S, limit_s / (FEWEST_ASKS + 1))
        self._asked_at = float("-inf")
        self._running_s = 0.0
        self._unanswered = 0

    def asks(self, now: float) -> bool:
        """Whether the worker is to be asked how long it has been at it."""
        every_s = self.every_s if self._running_s or self._unanswered else self._idle_s
        if not self._limit_s or now - self._asked_at < every_s:
            return False
        self._asked_at = now
        self._unanswered += 1
        return True

    def answered(self, peeked: Peeked) -> None:
        """Take in what the worker said."""
        self._unanswered = 0
        self._running_s = max((one.running_s for one in peeked.models), default=0.0)

    def rest(self) -> None:
        """There is no worker to be asked, or it does what may keep it from answering, such as loading."""
        self._unanswered = 0
        self._running_s = 0.0

    def hangs(self) -> str | None:
        """Why the worker must be ended, in a sentence; None while all is well."""
        if self._limit_s and self._running_s >= self._limit_s:
            return f"one inference has been going on for {self._running_s:.0f} s, {self._limit_s:g} s are allowed"
        silent_s = (self._unanswered - 1) * self.every_s
        if self._unanswered > FEWEST_ASKS and silent_s >= self._limit_s:
            return f"it has not answered for {silent_s:.0f} s"
        return None
