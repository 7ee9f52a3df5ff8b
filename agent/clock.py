"""A wall clock that nobody sets while the process lives: the time at the start, and what has passed since."""

from __future__ import annotations

import time


class SteadyClock:
    """Unix seconds as the clock said them when this was made; from there on they go as fast as time does."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Now."""
        return self._offset + time.monotonic()
