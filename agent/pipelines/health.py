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
    """

    def __init__(self, say: Callable[[FromPipeline], object]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._holds: dict[tuple[str, str], str] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._said_at: dict[tuple[str, str], float] = {}

    def trouble(self, code: str, part: str, detail: str, *, count: int = 1, ongoing: bool = True) -> None:
        """Something does not go on, or went wrong: that is said once a minute, with how often."""
        with self._lock:
            key, now = (code, part), time.monotonic()
            fresh = self._holds.get(key) != detail
            if ongoing:
                if not fresh:
                    return
                self._holds[key] = detail
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
            if self._holds.pop((code, part), None) is None:
                return
            self._say(Fine(code, part))
        log.info("%s of %s is over", code, part)
