"""What became of requests, told to the event loop that waits for it: once for all of a batch, not once for each."""

from __future__ import annotations

import asyncio
from collections import deque

from agent.runtimes.base import Tensors


class Results:
    """Results that a loop has not heard of yet.

    Args:
        loop: of all who wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._results: deque[tuple[asyncio.Future[Tensors], Tensors | Exception]] = deque()
        self._called = False  # the loop is about to look, for something that was or will be added

    def add(self, future: asyncio.Future[Tensors], result: Tensors | Exception) -> None:
        """One is there: from any thread."""
        self._results.append((future, result))
        if not self._called:
            self._called = True
            self.loop.call_soon_threadsafe(self.tell)

    def gather(self) -> None:
        """More are to come in this turn of the loop, which will `tell` at its end: in the loop."""
        self._called = True

    def tell(self) -> None:
        """Give everyone theirs: in the loop."""
        self._called = False  # first: what is added from here on calls again
        while self._results:
            future, result = self._results.popleft()
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
