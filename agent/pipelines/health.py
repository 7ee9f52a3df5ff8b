"""What goes wrong in a pipeline, told to the supervisor when it changes. May be used by any thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from agent.pipelines.ipc import Fine, FromPipeline, Trouble

log = logging.getLogger("agent.pipelines")
SAY_S = 60.0


class Health:
    """What holds now.

    Args:
        say: tells the supervisor.
        hold_s: how long something must go on before it is told.
        clock: seconds, of a clock that is never set.
    """

    def __init__(
        self, say: Callable[[FromPipeline], object], hold_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._hold_s, self._clock = say, hold_s, clock
        self._lock = threading.Lock()
        self._since: dict[tuple[str, str], float] = {}
        self._told: dict[tuple[str, str], str] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._said_at: dict[tuple[str, str], float] = {}

    def trouble(self, code: str, part: str, detail: str, *, count: int = 1, ongoing: bool = True) -> None:
        """Something does not go on, or went wrong.

        What goes on is told when it has for a while: a model that is busy for a moment is no problem of the device.
        What went wrong is told once a minute, with how often.
        """
        with self._lock:
            key, now = (code, part), self._clock()
            if ongoing:
                held = now - self._since.setdefault(key, now)
                if held < self._hold_s or self._told.get(key) == detail:
                    return
                self._told[key] = detail
            else:
                self._counts[key] = count = self._counts.get(key, 0) + count
                if now - self._said_at.get(key, -SAY_S) < SAY_S:
                    return
                self._counts[key], self._said_at[key] = 0, now
            self._say(Trouble(code, part, detail, count, ongoing))
        log.warning("%s (%d): %s", code, count, detail)

    def tick(self, code: str, part: str, detail: str) -> None:
        """Say what was counted and not said yet."""
        key = (code, part)
        if self._counts.get(key):
            self.trouble(code, part, detail, count=0, ongoing=False)

    def fine(self, code: str, part: str) -> None:
        """It is no more."""
        with self._lock:
            self._since.pop((code, part), None)
            if self._told.pop((code, part), None) is None:
                return
            self._say(Fine(code, part))
        log.info("%s of %s is over", code, part)
