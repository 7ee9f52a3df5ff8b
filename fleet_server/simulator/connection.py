"""One device's connection to the broker: an asyncio protocol with no task and no timer of its own.

Thousands of them share an event loop, so each is kept small; who owns them pings (`keep`) and reconnects. A connection
can be cut as a power cut would cut it: without a goodbye, so that the broker says the will.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from typing import Protocol

from fleet_server.simulator import packets
from fleet_server.simulator.packets import Kind, PacketError, Reader

KEEPALIVE_S = 60
IDS = 65_535


class Owner(Protocol):
    """Who is told what comes; called in the event loop."""

    def connected(self) -> None:
        """The broker has accepted the connection."""
        ...

    def received(self, topic: str, payload: bytes) -> None:
        """A message came."""
        ...

    def lost(self, reason: str) -> None:
        """The connection ended, or the broker refused it; nothing more comes."""
        ...


class Session:
    """What outlives a connection: messages that the broker has not acknowledged. It ends with the agent's process."""

    __slots__ = ("_last_id", "pending")

    def __init__(self) -> None:
        self.pending: dict[int, bytes] = {}
        self._last_id = 0

    def next_id(self) -> int:
        """An id that no message waits under."""
        while True:
            self._last_id = self._last_id % IDS + 1
            if self._last_id not in self.pending:
                return self._last_id


class Connection(asyncio.Protocol):
    """From connecting to the end. A new connection is a new object.

    Args:
        session: of the device.
        hello: its CONNECT.
        owner: is told.

    Attributes:
        closed: it has ended, and what was written has gone.
    """

    __slots__ = ("_accepted", "_hello", "_owner", "_reader", "_session", "_transport", "closed", "heard_at", "spoke_at")

    def __init__(self, session: Session, hello: bytes, owner: Owner) -> None:
        self._session = session
        self._hello = hello
        self._owner: Owner | None = owner
        self._reader = Reader()
        self._transport: asyncio.Transport | None = None
        self._accepted = self.closed = False
        self.heard_at = self.spoke_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("socket")
        if peer is not None:
            with contextlib.suppress(OSError):  # a Unix socket has no such option
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.heard_at = asyncio.get_running_loop().time()
        self._write(self._hello)

    def data_received(self, data: bytes) -> None:
        """Take what came; a broker that speaks nonsense is left."""
        self.heard_at = asyncio.get_running_loop().time()
        try:
            for packet in self._reader.feed(data):
                self._take(packet)
        except PacketError as error:
            self._end(f"the broker spoke no MQTT 3.1.1: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell it, unless it was meant."""
        self.closed = True
        self._end(str(exc) if exc else "the broker closed the connection")

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send at quality of service 1; it is sent again at the next connection until it is acknowledged."""
        packet_id = self._session.next_id()
        packet = packets.publish(topic, payload, packet_id, retain=retain)
        self._session.pending[packet_id] = packet
        self._write(packet)

    def subscribe(self, filters: Sequence[tuple[str, int]]) -> None:
        """Subscribe, each at its quality of service."""
        self._write(packets.subscribe(self._session.next_id(), filters))

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Subscribe no more."""
        self._write(packets.unsubscribe(self._session.next_id(), filters))

    def keep(self, now: float) -> None:
        """Ping when nothing was said for a while; end a connection on which nothing is heard.

        Args:
            now: the event loop's time.
        """
        if now - self.heard_at > 1.5 * KEEPALIVE_S:
            self._end(f"the broker said nothing for {1.5 * KEEPALIVE_S:.0f} s")
        elif now - self.spoke_at > KEEPALIVE_S / 2 or now - self.heard_at > KEEPALIVE_S / 2:
            self._write(packets.PING)

    def close(self) -> None:
        """Say goodbye; the owner is told nothing more."""
        self._owner = None
        if self._transport is not None and not self._transport.is_closing():
            self._write(packets.GOODBYE)
            self._transport.close()

    def cut(self) -> None:
        """End it at once and without a word; the owner is told nothing more."""
        self._owner = None
        if self._transport is not None:
            self._transport.abort()

    def _take(self, packet: packets.Packet) -> None:
        owner = self._owner
        if owner is None:
            return
        if not self._accepted:
            _, code = packets.read_connack(packet)
            if code != 0:
                self._end(f"the broker refused the connection with code {code}")
                return
            self._accepted = True
            for pending in list(self._session.pending.values()):
                self._write(packets.again(pending))
            owner.connected()
        elif packet.kind is Kind.PUBLISH:
            message = packets.read_publish(packet)
            if message.packet_id:
                self._write(packets.acknowledge(message.packet_id))
            owner.received(message.topic, message.payload)
        elif packet.kind is Kind.PUBACK:
            self._session.pending.pop(packets.read_packet_id(packet), None)

    def _end(self, reason: str) -> None:
        owner, self._owner = self._owner, None
        if self._transport is not None:
            self._transport.abort()
        if owner is not None:
            owner.lost(reason)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self.spoke_at = asyncio.get_running_loop().time()
            self._transport.write(data)
