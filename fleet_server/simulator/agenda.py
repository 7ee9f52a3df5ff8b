"""What a simulated device is going to do, and when. Pure: the clock is passed in."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Agenda:
    """Calls by their time, in seconds; of the same time in the order in which they were asked for."""

    __slots__ = ("_calls", "_numbers")

    def __init__(self) -> None:
        self._calls: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    @property
    def next_at(self) -> float:
        """When the next call is due; infinity when there is none."""
        return self._calls[0][0] if self._calls else float("inf")

    def at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        """Have something called at a time."""
        heapq.heappush(self._calls, (when, next(self._numbers), call, arguments))

    def run(self, now: float) -> None:
        """Call what is due; what that asks for, and is due too, as well."""
        while self._calls and self._calls[0][0] <= now:
            _, _, call, arguments = heapq.heappop(self._calls)
            call(*arguments)

    def clear(self) -> None:
        """Forget everything."""
        self._calls.clear()
