"""A client's waiting for threads: it blocks the one that calls."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence

from agent.client.http1 import Content
from agent.client.waiting import Stream, Turns, left_s, own_address, pieces_of, soon


class Blocking:
    """Blocks the thread."""

    async def connect(self, listen: str, unix_socket: str, until: float | None) -> Stream:
        """A connection."""
        wait_s = left_s(soon(until))
        if not unix_socket:
            sock = socket.create_connection(own_address(listen), timeout=wait_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _BlockingStream(sock)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(wait_s)
        try:
            sock.connect(unix_socket)
        except BaseException:
            sock.close()
            raise
        return _BlockingStream(sock)

    async def pause(self, seconds: float) -> None:
        """Do nothing for a while."""
        time.sleep(seconds)  # noqa: ASYNC251 (there is no loop here)

    def turns(self, count: int) -> Turns:
        """So many at a time."""
        return _BlockingTurns(count)


class _BlockingStream:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def send(self, parts: Sequence[Content], until: float | None) -> None:
        for piece in pieces_of(parts):
            self._sock.settimeout(left_s(until))
            self._sock.sendall(piece)

    async def receive(self, into: memoryview, until: float | None) -> int:
        self._sock.settimeout(left_s(until))
        return self._sock.recv_into(into)

    def close(self) -> None:
        self._sock.close()


class _BlockingTurns:
    def __init__(self, count: int) -> None:
        self._free = threading.Semaphore(count)

    async def take(self, until: float) -> bool:
        return self._free.acquire(timeout=max(0.0, until - time.monotonic()))

    def give(self) -> None:
        self._free.release()
