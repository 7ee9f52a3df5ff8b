"""MQTT 3.1.1 as bytes: what a device sends, and what a broker answers. Pure.

Of the standard (OASIS, MQTT 3.1.1, 2014) this is what Shoal's wire contract needs: quality of service 0 and 1, a will,
user and password, sessions that are kept. Section numbers are its.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from agent.protocol.limits import LIMITS

PACKET_BYTES = LIMITS.message_bytes + 64 * 1024
"""The largest packet that is read: a message, its topic and header."""
DUPLICATE = 0x08
PING = b"\xc0\x00"
GOODBYE = b"\xe0\x00"
_LENGTH_BYTES = 4


class PacketError(Exception):
    """What came is no MQTT 3.1.1, or nothing that was asked for; the connection is of no use any more."""


class Kind(IntEnum):
    """Control packets that come from a broker (section 2.2.1)."""

    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    SUBACK = 9
    UNSUBACK = 11
    PINGRESP = 13


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet from a broker: its kind, the four flags of its first byte, and what follows the length."""

    kind: Kind
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Received:
    """A message.

    Attributes:
        topic: where it was published.
        payload: of it.
        packet_id: to be acknowledged; 0 at quality of service 0.
    """

    topic: str
    payload: bytes
    packet_id: int


@dataclass(frozen=True)
class Will:
    """What the broker publishes, retained and at quality of service 1, when a connection ends without a goodbye."""

    topic: str
    payload: bytes


def connect(
    client_id: str, will: Will, *, keepalive_s: int, user: str | None = None, password: str | None = None
) -> bytes:
    """CONNECT (section 3.1) to a session that outlives the connection."""
    flags = 0x04 | 0x08 | 0x20  # a will, at quality of service 1, retained
    body = [_text(client_id), _text(will.topic), _block(will.payload)]
    if user is not None:
        flags |= 0x80
        body.append(_text(user))
        if password is not None:
            flags |= 0x40
            body.append(_text(password))
    head = _text("MQTT") + struct.pack("!BBH", 4, flags, keepalive_s)
    return _packet(0x10, head + b"".join(body))


def subscribe(packet_id: int, filters: Sequence[tuple[str, int]]) -> bytes:
    """SUBSCRIBE (section 3.8) to filters, each with its quality of service."""
    return _packet(0x82, struct.pack("!H", packet_id) + b"".join(_text(one) + bytes((qos,)) for one, qos in filters))


def unsubscribe(packet_id: int, filters: Sequence[str]) -> bytes:
    """UNSUBSCRIBE (section 3.10)."""
    return _packet(0xA2, struct.pack("!H", packet_id) + b"".join(map(_text, filters)))


def publish(topic: str, payload: bytes, packet_id: int, *, retain: bool = False) -> bytes:
    """PUBLISH (section 3.3) at quality of service 1."""
    return _packet(0x32 | retain, _text(topic) + struct.pack("!H", packet_id) + payload)


def again(published: bytes) -> bytes:
    """A PUBLISH as it is sent another time (section 3.3.1.1)."""
    return bytes((published[0] | DUPLICATE,)) + published[1:]


def acknowledge(packet_id: int) -> bytes:
    """PUBACK (section 3.4)."""
    return struct.pack("!BBH", 0x40, 2, packet_id)


def read_connack(packet: Packet) -> tuple[bool, int]:
    """Whether the broker has the session still, and its return code: 0 has accepted the connection (section 3.2).

    Raises:
        PacketError: when it is none.
    """
    if packet.kind is not Kind.CONNACK or len(packet.body) < 2:
        raise PacketError("the broker's first packet is no CONNACK")
    return bool(packet.body[0] & 1), packet.body[1]


def read_publish(packet: Packet) -> Received:
    """A message from the broker.

    Raises:
        PacketError: when it is damaged, or of a quality of service that was not asked for.
    """
    qos, body = (packet.flags >> 1) & 3, packet.body
    if qos > 1 or len(body) < 2:
        raise PacketError(f"a message of quality of service {qos} that was not asked for, or a damaged one")
    end = 2 + int.from_bytes(body[:2])
    start = end + 2 * qos
    if start > len(body):
        raise PacketError("a message ends within its header")
    try:
        topic = body[2:end].decode()
    except UnicodeDecodeError:
        raise PacketError("a topic is no UTF-8") from None
    return Received(topic, body[start:], int.from_bytes(body[end:start]) if qos else 0)


def read_packet_id(packet: Packet) -> int:
    """What an acknowledgement is of.

    Raises:
        PacketError: when it is too short.
    """
    if len(packet.body) < 2:
        raise PacketError("an acknowledgement without a packet id")
    return int.from_bytes(packet.body[:2])


class Reader:
    """Cuts what comes into packets; what is not whole yet waits for the rest."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Packet]:
        """The packets that are whole with these bytes.

        Raises:
            PacketError: when they are none of a broker's, or too large.
        """
        data = self._rest + data if self._rest else data
        at, size = 0, len(data)
        while (found := _span(data, at, size)) is not None:
            start, end = found
            try:
                kind = Kind(data[at] >> 4)
            except ValueError:
                raise PacketError(f"a packet of kind {data[at] >> 4}, which no broker sends a client") from None
            yield Packet(kind, data[at] & 15, data[start:end])
            at = end
        self._rest = data[at:]


def _span(data: bytes, at: int, size: int) -> tuple[int, int] | None:
    """Where the body of the packet at an offset begins and ends; None while it is not all there (section 2.2.3)."""
    length, shift, position = 0, 0, at + 1
    while True:
        if position >= size:
            return None
        if position > at + _LENGTH_BYTES:
            raise PacketError("a length of more than four bytes")
        byte = data[position]
        length |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            break
    if length > PACKET_BYTES:
        raise PacketError(f"a packet of {length} bytes, at most {PACKET_BYTES} are read")
    return (position, position + length) if position + length <= size else None


def _packet(first: int, body: bytes) -> bytes:
    length, count = bytearray(), len(body)
    while True:
        count, digit = divmod(count, 128)
        length.append(digit | 128 if count else digit)
        if not count:
            return bytes((first,)) + bytes(length) + body


def _text(text: str) -> bytes:
    return _block(text.encode())


def _block(data: bytes) -> bytes:
    return struct.pack("!H", len(data)) + data
