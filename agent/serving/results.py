"""What became of requests, told to the event loop that waits for it: once for all of a batch, not once for each."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from agent.runtimes.base import Tensors

log = logging.getLogger(__name__)
Heard = Callable[[Tensors | Exception], None]


class Results:
    """Results that a loop has not heard of yet.

    Args:
        loop: of all who wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._results: deque[tuple[Heard, Tensors | Exception]] = deque()
        self._called = False  # the loop is about to look, for something that was or will be added

    def add(self, heard: Heard, result: Tensors | Exception) -> None:
        """One is there, for whoever is to hear of it in the loop: from any thread."""
        self._results.append((heard, result))
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
            heard, result = self._results.popleft()
            try:
                heard(result)
            except Exception:
                log.exception("what became of a request is lost")
