"""How a client waits, for threads and for asyncio: what it does is written once, as coroutines (`agent.client.core`).

One that only waits by `agent.client.blocking` never gives way, for that blocks the thread instead, and `now` runs it to
its end. A moment is by `time.monotonic`; None is never.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from agent.client.http1 import Content

ValueT = TypeVar("ValueT")
CONNECT_S = 5.0
TOGETHER = 64 << 10  # bytes below which parts are sent as one


class Stream(Protocol):
    """A connection."""

    async def send(self, parts: Sequence[Content], until: float | None) -> None:
        """Send bytes.

        Raises:
            OSError: when they don't go; TimeoutError when that is over.
        """
        ...

    async def receive(self, into: memoryview, until: float | None) -> int:
        """Take some bytes; how many, and 0 when no more will come.

        Raises:
            OSError: as `send`.
        """
        ...

    def close(self) -> None:
        """End it."""
        ...


class Turns(Protocol):
    """So many at a time."""

    async def take(self, until: float) -> bool:
        """Wait for one; false when it did not come by then."""
        ...

    def give(self) -> None:
        """One is free again."""
        ...


class Waiting(Protocol):
    """One way to wait."""

    async def connect(self, listen: str, unix_socket: str, until: float | None) -> Stream:
        """A connection.

        Raises:
            OSError: when nobody is there.
        """
        ...

    async def pause(self, seconds: float) -> None:
        """Do nothing for a while."""
        ...

    def turns(self, count: int) -> Turns:
        """So many at a time."""
        ...


def now(coroutine: Coroutine[Any, Any, ValueT]) -> ValueT:
    """What a coroutine comes to that only waits by `Blocking`."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: ValueT = done.value
        return value
    coroutine.close()
    raise RuntimeError("it waits for an event loop, and there is none")


def left_s(until: float | None) -> float | None:
    """Seconds until then.

    Raises:
        TimeoutError: none are left.
    """
    if until is None:
        return None
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def own_address(listen: str) -> tuple[str, int]:
    """Where a server that listens at `host:port` is reached from its own machine."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host), int(port)  # noqa: S104


def pieces_of(parts: Sequence[Content]) -> Sequence[Content]:
    """What to send one after another: small parts as one."""
    return [b"".join(parts)] if sum(map(len, parts)) < TOGETHER else parts


def soon(until: float | None) -> float:
    """Until when a connection is waited for."""
    return time.monotonic() + CONNECT_S if until is None else min(until, time.monotonic() + CONNECT_S)
