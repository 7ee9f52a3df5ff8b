"""Who is connected to the local inference API: how many may be, and how many bytes of requests all of them may hold."""

from __future__ import annotations

import os
import time
from typing import Protocol

from agent.serving.company import Company
from agent.serving.exchange import BODY_LIMIT

CLIENTS_LIMIT = 512
INBOX_BYTES = 16 << 10  # what is larger, the parser would copy into memory that is new each time
FRESH_S = 1.0  # in which who has just come begins to ask
SHARE = 4  # of the machine's memory requests may hold one part in so many


class Client(Protocol):
    """A connection."""

    def leave(self) -> None:
        """End it: it is idle, and another one needs its place."""
        ...


def bytes_limit() -> int:
    """How many bytes all requests together may hold on this machine, never less than two of the largest."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not every system says
        memory = 0
    return max(2 * BODY_LIMIT, memory // SHARE)


class Clients:
    """All that are connected. Used by one event loop alone.

    Attributes:
        bytes_allowed: that all requests together may hold.
        company: who of them asks at present.
        came: a connection's bytes, which are parsed before another's are read.
        inbox: the same, to read them into.
    """

    def __init__(self, limit: int = CLIENTS_LIMIT, bytes_allowed: int | None = None) -> None:
        self._limit = limit
        self.bytes_allowed = bytes_limit() if bytes_allowed is None else bytes_allowed
        self.came = bytearray(INBOX_BYTES)
        self.inbox = memoryview(self.came)
        self.company = Company()
        self._held = 0
        self._all: set[Client] = set()
        self._idle: dict[Client, None] = {}  # who has been idle for longest comes first
        self._fresh: dict[Client, float] = {}  # who has not asked yet, and when they came

    def __len__(self) -> int:
        return len(self._all)

    @property
    def asking(self) -> int:
        """How many have begun to ask and are not answered."""
        return len(self._all) - len(self._idle)

    @property
    def about_to_ask(self) -> bool:
        """Whether somebody has just come, and has not begun to ask."""
        newest = next(reversed(self._fresh.values()), None)
        return newest is not None and time.monotonic() - newest < FRESH_S

    def come(self, client: Client) -> bool:
        """One has connected; false when there is no place for it. One that is idle gives its place."""
        if len(self._all) >= self._limit:
            longest = next(iter(self._idle), None)
            if longest is None:
                return False
            self.go(longest)
            longest.leave()
        self._all.add(client)
        self._idle[client] = None
        self._fresh[client] = time.monotonic()
        return True

    def go(self, client: Client) -> None:
        """One has gone."""
        self._all.discard(client)
        self._idle.pop(client, None)
        self._fresh.pop(client, None)

    def busy(self, client: Client) -> None:
        """One has begun to ask."""
        self._idle.pop(client, None)
        self._fresh.pop(client, None)

    def idle(self, client: Client) -> None:
        """One was answered."""
        if client in self._all:
            self._idle[client] = None

    def hold(self, size: int) -> bool:
        """Some more bytes of a request have come; false when there is no room for them."""
        if self._held + size > self.bytes_allowed:
            return False
        self._held += size
        return True

    def release(self, size: int) -> None:
        """Bytes are held no more."""
        self._held -= size
