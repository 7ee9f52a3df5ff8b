"""A client's waiting for asyncio, on the event loop's sockets: no threads, and nothing goes on that was cancelled."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from agent.client.http1 import Content
from agent.client.waiting import Stream, Turns, left_s, own_address, pieces_of, soon

FULL_S = 0.01


class Asyncio:
    """Lets the event loop run meanwhile; a task that is cancelled while it waits has taken nothing."""

    async def connect(self, listen: str, unix_socket: str, until: float | None) -> Stream:
        """A connection."""
        async with _before(soon(until)):
            if unix_socket:
                return await _connected_locally(unix_socket)
            host, port = own_address(listen)
            error = OSError(f"{host[:100]!r} has no address")
            for family, address in await _addresses(host, port):
                try:
                    return await _connected(family, address)
                except OSError as failed:
                    error = failed
            raise error

    async def pause(self, seconds: float) -> None:
        """Do nothing for a while."""
        await asyncio.sleep(seconds)

    def turns(self, count: int) -> Turns:
        """So many at a time."""
        return _AsyncioTurns(count)


async def _connected_locally(path: str) -> Stream:
    """By a Unix socket, which is connected at once, or not as long as too many others wait for it to be accepted."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                await asyncio.sleep(FULL_S)
            else:
                return _AsyncioStream(sock)
    except BaseException:
        sock.close()
        raise


async def _connected(family: int, address: Any) -> Stream:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return _AsyncioStream(sock)


async def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Where a host is; one that is named by its number takes no thread of the loop's."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [(family, address) for family, _, _, _, address in found]
    return [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]


class _AsyncioStream:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def send(self, parts: Sequence[Content], until: float | None) -> None:
        loop = asyncio.get_running_loop()
        async with _before(until):
            for piece in pieces_of(parts):
                await loop.sock_sendall(self._sock, piece)

    async def receive(self, into: memoryview, until: float | None) -> int:
        async with _before(until):
            return await asyncio.get_running_loop().sock_recv_into(self._sock, into)

    def close(self) -> None:
        self._sock.close()


class _AsyncioTurns:
    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)

    async def take(self, until: float) -> bool:
        if not self._free.locked():
            return await self._free.acquire()
        try:
            async with _before(until):
                return await self._free.acquire()
        except TimeoutError:
            return False

    def give(self) -> None:
        self._free.release()


def _before(until: float | None) -> AbstractAsyncContextManager[Any]:
    """Raises TimeoutError when what is done there is not done by then."""
    left = left_s(until)
    return asyncio.timeout(None if left is None or math.isinf(left) else left)
