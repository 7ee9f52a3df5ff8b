"""Where peers connect: devices of the same fleet, by mutual TLS, so many at once. Handshakes count too."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from agent.peers.certificates import device_of, organization_of
from agent.serving.balancing.answering import PeerApi
from agent.serving.balancing.links import PeerTls
from agent.serving.connection import Connection

log = logging.getLogger("agent.balancing")
CONNECTIONS = 128
HANDSHAKES = 32  # of these, that are left to who is about to come; one that is idle gives its place
HANDSHAKE_S = 3.0
PAUSE_S = 0.1  # where the system has no room for a connection


@dataclass
class Guests:
    """Who may ask.

    Attributes:
        tls: how peers are known; None for plain HTTP, where everybody may.
        devices: whose requests are answered; empty for every device of the fleet.
    """

    tls: PeerTls | None
    devices: frozenset[str] = frozenset()

    def admits(self, transport: asyncio.BaseTransport) -> bool:
        """Whether who has connected may ask."""
        if self.tls is None:
            return True
        certificate = transport.get_extra_info("peercert")
        in_fleet = bool(self.tls.fleet) and organization_of(certificate) == self.tls.fleet
        return in_fleet and (not self.devices or device_of(certificate) in self.devices)


class _PeerConnection(Connection):
    """A peer. However near it is, it is not this machine, whose memory it may not name.

    Attributes:
        came: whether it was there when its handshake was over.
    """

    def __init__(self, api: PeerApi, guests: Guests, gone: Callable[[], None]) -> None:
        super().__init__(api)
        self._guests, self._gone = guests, gone
        self._admitted = False
        self.came = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.came = True
        if not self._guests.admits(transport):
            log.warning("a device that may not ask this one was turned away: see balancing.devices, and its fleet")
            assert isinstance(transport, asyncio.Transport)
            transport.abort()
            return
        self._admitted = True
        super().connection_made(transport)
        self._incoming.local = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone()
        if self._admitted:
            super().connection_lost(exc)

    def buffer_updated(self, nbytes: int) -> None:
        if self._admitted:
            super().buffer_updated(nbytes)

    def eof_received(self) -> bool:
        """TLS has no connection that is half open."""
        return super().eof_received() if self._admitted and self._guests.tls is None else False


class PeerListener:
    """Takes peers' connections.

    Args:
        sockets: that listen.
        api: answers them.
    """

    def __init__(self, sockets: list[socket.socket], api: PeerApi) -> None:
        self._sockets = sockets
        self._api = api
        self._guests = Guests(None)
        self._open = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = False

    def told(self, guests: Guests) -> None:
        """Take those from now on."""
        self._guests = guests
        if not self._accepting:
            self._accepting = True
            for one in self._sockets:
                one.setblocking(False)
                self._begin(self._accept(one))

    def close(self) -> None:
        """Take no more; who is connected is answered what has begun."""
        self._api.draining = True
        for task in self._tasks:
            task.cancel()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.debug("no connection can be accepted: %s", error)
                await asyncio.sleep(PAUSE_S)
                continue
            if self._open >= CONNECTIONS:
                sock.close()
                continue
            self._open += 1
            self._begin(self._welcome(sock))

    async def _welcome(self, sock: socket.socket) -> None:
        guests, loop = self._guests, asyncio.get_running_loop()
        gone = _Once(self._leave)
        tls = None if guests.tls is None else guests.tls.context
        try:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, connection = await loop.connect_accepted_socket(
                lambda: _PeerConnection(self._api, guests, gone),
                sock,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else HANDSHAKE_S,
            )
            if not connection.came:  # it ended in the middle of the handshake: nothing else says so
                gone()
        except OSError as error:  # SSLError is one
            log.debug("a peer did not come in: %s", error)
            gone()
            sock.close()
        except asyncio.CancelledError:
            gone()
            sock.close()
            raise

    def _leave(self) -> None:
        self._open -= 1


class _Once:
    """Calls something the first time that it is called."""

    def __init__(self, what: Callable[[], None]) -> None:
        self._what: Callable[[], None] | None = what

    def __call__(self) -> None:
        what, self._what = self._what, None
        if what is not None:
            what()
