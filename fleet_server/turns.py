"""A lock that threads get in the order in which they asked for it."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class Turns:
    """Used as a context. Who has it must not ask for it again: it would wait for itself.

    An ordinary lock goes to whoever asks at the right moment, so that a thread which asks often can shut others out.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        """Wait for the turn."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()  # let go by who has it: it is handed over, and never free in between
        except BaseException:
            self._withdraw(turn)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hand it to who has waited longest."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    def _withdraw(self, turn: threading.Lock) -> None:
        """Interrupted while waiting: somebody else's turn comes, if it was handed over meanwhile."""
        with self._guard:
            waiting = turn in self._waiting
            if waiting:
                self._waiting.remove(turn)
        if not waiting:
            self.__exit__(None, None, None)
