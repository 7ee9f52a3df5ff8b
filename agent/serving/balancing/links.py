"""Connections to peers, kept for the next request. One has one request at a time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.client.http1 import Ask, Reply, ReplyError, ReplyReader, head
from agent.peers.certificates import organization_of
from agent.protocol.topics import DEVICE_HOST
from agent.source_config import split_place

if TYPE_CHECKING:  # which many a device has no use for
    import ssl

CONNECT_S = 2.0  # the handshake included
IDLE_S = 15.0
STALE_S = 0.5  # within which a connection that stood idle turns out to have been ended
WRITTEN_AT_ONCE = 64 << 10


class CutOffError(ConnectionError):
    """The connection ended before an answer was there."""


@dataclass(frozen=True)
class PeerTls:
    """How peers are known: by a certificate of the fleet's CA, for the name that all devices have.

    Attributes:
        context: that believes that CA alone, and shows this device's certificate.
        fleet: that a peer's certificate has to name.
    """

    context: ssl.SSLContext
    fleet: str


class _Link(asyncio.BufferedProtocol):
    """A connection."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.idle_until: asyncio.TimerHandle | None = None
        self._reader: ReplyReader | None = None
        self._reply: asyncio.Future[Reply] | None = None
        self._nothing = bytearray(1)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview | bytearray:  # noqa: ARG002
        return self._nothing if self._reader is None else self._reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        reader, reply = self._reader, self._reply
        if reader is None or reply is None:
            self.close()  # nothing was asked
            return
        try:
            reader.came(nbytes)
        except ReplyError as error:
            self._end(error)
            return
        if reader.reply is not None:
            self._reader = self._reply = None
            if reader.last:
                self.close()
            if not reply.done():
                reply.set_result(reader.reply)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._end(CutOffError(str(exc) if exc else "the connection ended"))

    @property
    def open(self) -> bool:
        """Whether another request may go by it."""
        return self.transport is not None and not self.transport.is_closing()

    async def ask(self, ask: Ask) -> Reply:
        """One request's answer.

        Raises:
            ReplyError: when what comes is none.
            CutOffError: when the connection ends before.
            CancelledError: when nobody wants it any more; then the connection ends.
        """
        assert self.transport is not None
        self._reader = ReplyReader()
        self._reply = asyncio.get_running_loop().create_future()
        pieces = [head(ask), *ask.body]
        if sum(map(len, pieces)) <= WRITTEN_AT_ONCE:
            pieces = [b"".join(pieces)]
        for piece in pieces:
            self.transport.write(piece)
        try:
            return await self._reply
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """End it."""
        if self.idle_until is not None:
            self.idle_until.cancel()
        if self.transport is not None:
            self.transport.abort()

    def _end(self, error: Exception) -> None:
        reply, self._reader, self._reply = self._reply, None, None
        if reply is not None and not reply.done():
            reply.set_exception(error)
        self.close()


class Links:
    """The connections of a device to its peers.

    Args:
        tls: how peers are known; None for plain HTTP.
    """

    def __init__(self, tls: PeerTls | None) -> None:
        self._tls = tls
        self._idle: dict[str, list[_Link]] = {}
        self._closed = False

    async def ask(self, place: str, ask: Ask, until: float) -> Reply:
        """A peer's answer.

        Args:
            place: of the peer, `host:port`.
            ask: what it is asked.
            until: when it is given up, by the event loop's clock.

        Raises:
            TimeoutError: when it is not there by then.
            OSError: when there is none.
        """
        async with asyncio.timeout_at(until):
            link, began = self._kept(place), asyncio.get_running_loop().time()
            if link is not None:
                try:
                    return await self._by(link, place, ask)
                except CutOffError:
                    # One that stood idle may have been ended: that is no failure. Later the request itself may be why.
                    if asyncio.get_running_loop().time() - began > STALE_S:
                        raise
            return await self._by(await self._connected(place), place, ask)

    def close(self) -> None:
        """End all that is idle now, and what is under way when it is over."""
        self._closed = True
        for links in self._idle.values():
            for link in links:
                link.close()
        self._idle.clear()

    async def _by(self, link: _Link, place: str, ask: Ask) -> Reply:
        reply = await link.ask(ask)
        if self._closed:
            link.close()
        elif link.open:
            self._idle.setdefault(place, []).append(link)
            link.idle_until = asyncio.get_running_loop().call_later(IDLE_S, self._forget, place, link)
        return reply

    def _forget(self, place: str, link: _Link) -> None:
        links = self._idle.get(place, [])
        if link in links:
            links.remove(link)
        if not links:
            self._idle.pop(place, None)
        link.close()

    def _kept(self, place: str) -> _Link | None:
        links = self._idle.get(place, [])
        while links:
            link = links.pop()
            if link.idle_until is not None:
                link.idle_until.cancel()
            if link.open:
                return link
        return None

    async def _connected(self, place: str) -> _Link:
        loop, tls = asyncio.get_running_loop(), self._tls
        host, port = split_place(place)
        async with asyncio.timeout(CONNECT_S):
            if tls is None:
                _, link = await loop.create_connection(_Link, host, port)
                return link
            _, link = await loop.create_connection(
                _Link, host, port, ssl=tls.context, server_hostname=DEVICE_HOST, ssl_handshake_timeout=CONNECT_S
            )
        if link.transport is None or organization_of(link.transport.get_extra_info("peercert")) != tls.fleet:
            link.close()
            raise CutOffError("it is a device of another fleet")
        return link
