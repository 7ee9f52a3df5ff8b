"""Requests that wait for a model: bounded, the most urgent first, and each only as long as its client would wait.

It knows no model and no HTTP. Thread-safe: an event loop puts requests in, the model's thread takes them out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from agent.runtimes.base import Tensors

HIGHEST, DEFAULT, LOWEST = 1, 50, 100  # priorities


class ClosedError(Exception):
    """Nothing more is taken in."""


class QueueFullError(Exception):
    """More requests wait than may.

    Attributes:
        retry_after_s: when there may be room, in seconds.
        waited_s: how long the request has waited before another took its place, in seconds.
    """

    def __init__(self, retry_after_s: float = 1.0, waited_s: float = 0.0) -> None:
        super().__init__("too many requests wait")
        self.retry_after_s = retry_after_s
        self.waited_s = waited_s


class DeadlineError(Exception):
    """A request was not begun as soon as its client asked for."""


class Request(msgspec.Struct, eq=False):
    """One that waits.

    Attributes:
        inputs: checked against the manifest.
        rows: how many it has.
        request_id: the client's.
        came_at: by `time.perf_counter`.
        done: takes what became of it; called once, from any thread.
        priority: from `HIGHEST` to `LOWEST`.
        waits: whether it still waits.
        turn_at: when its turn came, by `time.perf_counter`; 0 before that.
    """

    inputs: Tensors
    rows: int
    request_id: str
    came_at: float
    done: Callable[[Tensors | Exception], None]
    priority: int = DEFAULT
    waits: bool = False
    turn_at: float = 0.0


class RequestQueue:
    """The requests of one model; of one priority, who comes first goes first.

    Args:
        limit: how many may wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queues: dict[int, deque[Request]] = {}
        self._count = 0
        self._closed = False
        self._woken = False  # who waits in `take` is to have what is there
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._count

    def put(self, request: Request, *, wake: bool = True) -> Request | None:
        """Let a request wait.

        Args:
            request: that has just come.
            wake: whether who waits in `take` is to have it; otherwise the caller sees to it that it is taken.

        Returns:
            One of lower priority that had to go for it; None when there was room.

        Raises:
            ClosedError: when the queue is closed.
            QueueFullError: when nothing of lower priority waits, and no more may.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            gone = self._make_room(request.priority) if self._count >= self._limit else None
            queue = self._queues.get(request.priority)
            if queue is None:
                queue = self._queues[request.priority] = deque()
                self._queues = dict(sorted(self._queues.items()))
            queue.append(request)
            request.waits = True
            self._count += 1
            if wake:
                self._wake()
        return gone

    def wake(self) -> None:
        """Let who waits in `take` have all that is there, until nothing is."""
        with self._changed:
            self._wake()

    def leave(self) -> bool:
        """Let `take` wait until it is woken, whatever is there; whether anything is."""
        with self._changed:
            self._woken = False
            return self._count > 0

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._changed.notify()

    def take(self) -> Request | None:
        """The next one, as soon as it is woken and there is one; None when the queue is closed and empty."""
        with self._changed:
            while True:
                if self._woken or self._closed:
                    found = self._first()
                    if found is not None:
                        return self._out(found)
                    if self._closed:
                        return None
                    self._woken = False
                self._changed.wait()

    def take_now(self) -> Request | None:
        """The next one, if there is one."""
        with self._changed:
            found = self._first()
            return None if found is None else self._out(found)

    def take_like(self, fits: Callable[[Request], bool], until: float) -> Request | None:
        """The next one, if it fits; None when it does not, or none came until then.

        Args:
            fits: whether one is wanted.
            until: by `time.perf_counter`; one in the past does not wait.
        """
        with self._changed:
            while (found := self._first()) is None:
                left = until - time.perf_counter()
                if self._closed or left <= 0:
                    return None
                self._changed.wait(left)
            return self._out(found) if fits(found) else None

    def give_up(self, request: Request) -> bool:
        """A request is to wait no more; false when it does not wait any more, for its turn has come."""
        with self._changed:
            if not request.waits:
                return False
            self._queues[request.priority].remove(request)
            self._leave(request)
            return True

    def close(self) -> None:
        """Take nothing more in. What waits is still given out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _first(self) -> Request | None:
        return next((queue[0] for queue in self._queues.values()), None)

    def _out(self, request: Request) -> Request:
        self._queues[request.priority].popleft()
        self._leave(request)
        return request

    def _leave(self, request: Request) -> None:
        request.waits = False
        self._count -= 1
        if not self._queues[request.priority]:
            del self._queues[request.priority]

    def _make_room(self, priority: int) -> Request:
        lowest = next(reversed(self._queues))
        if lowest <= priority:
            raise QueueFullError
        gone = self._queues[lowest].pop()
        self._leave(gone)
        return gone
