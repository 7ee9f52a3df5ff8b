"""Large messages are read whole however the connection cuts them; everything else is left for the library."""

from __future__ import annotations

import random
import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion

from agent.mqtt import MqttChunk, _Client
from agent.packets import BUFFER, LARGE, Buffers, LargeMessage, MalformedPacketError, PacketReader, Receive

TOPIC = "shoal/v1/b/" + "a" * 64 + "/7"


def varint(value: int) -> bytes:
    found = bytearray()
    while True:
        value, low = divmod(value, 128)
        found.append(low | (0x80 if value else 0))
        if not value:
            return bytes(found)


def publish(
    payload: bytes, *, qos: int = 0, five: bool = True, topic: bytes = TOPIC.encode(), properties: bytes = b""
) -> bytes:
    body = len(topic).to_bytes(2, "big") + topic + ((5).to_bytes(2, "big") if qos else b"")
    body += (varint(len(properties)) + properties if five else b"") + payload
    return bytes([0x30 | qos << 1]) + varint(len(body)) + body


class Wire:
    """Gives what was sent in pieces, with moments in which there is nothing."""

    def __init__(self, data: bytes, chance: random.Random) -> None:
        self.data, self.chance = data, chance

    def __call__(self, view: memoryview) -> int:
        if self.data and self.chance.random() < 0.2:
            raise BlockingIOError
        size = min(len(view), len(self.data), self.chance.choice([1, 3, 5000, 10**6]))
        view[:size] = self.data[:size]
        self.data = self.data[size:]
        return size


def patient(wire: Wire) -> Receive:
    def receive(view: memoryview) -> int:
        while True:
            try:
                return wire(view)
            except BlockingIOError:
                continue

    return receive


def by_library(reader: PacketReader, receive: Receive) -> bytes:
    """One packet, as the library reads it."""

    def some(size: int) -> bytes:
        if reader.holds:
            return reader.take(size)
        view = memoryview(bytearray(size))
        return bytes(view[: receive(view)])

    packet = some(1)
    length = shift = 0
    while True:
        packet += some(1)
        length, shift = length | (packet[-1] & 0x7F) << shift, shift + 7
        if packet[-1] < 0x80:
            break
    while length:
        packet, length = packet + (got := some(length)), length - len(got)
    return packet


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), five=st.booleans())
def test_messages_come_out_as_they_were_sent_and_the_rest_is_left(seed: int, five: bool) -> None:
    chance = random.Random(seed)
    sent: list[tuple[bytes, int, bytes]] = []
    for _ in range(8):
        qos = chance.choice([0, 1])
        payload = chance.randbytes(chance.choice([5, LARGE, 256 * 1024]))
        properties = chance.choice([b"", b"\x01\x00", b"\x26" + (b"\0\x64" + bytes(100)) * 2])
        sent.append((publish(payload, qos=qos, five=five, properties=properties), qos, payload))
    wire = Wire(b"".join(packet for packet, _, _ in sent), chance)
    reader, large = PacketReader(Buffers(), five=five), 0
    for packet, qos, payload in sent:
        while True:
            try:
                if not reader.begins(wire):
                    assert by_library(reader, patient(wire)) == packet
                    break
                found = reader.read(wire)
            except BlockingIOError:
                continue
            large += 1
            assert (found.topic, found.message_id) == (TOPIC, 5 if qos else None)
            assert bytes(found.payload) == payload
            break
    assert not reader.holds
    assert not wire.data
    assert large <= sum(len(payload) >= LARGE for _, _, payload in sent)


def at_once(data: bytes) -> Receive:
    """A connection on which everything is there already."""
    rest = memoryview(data)

    def receive(view: memoryview) -> int:
        nonlocal rest
        size = min(len(view), len(rest))
        view[:size], rest = rest[:size], rest[size:]
        return size

    return receive


def read(data: bytes) -> LargeMessage:
    receive, reader = at_once(data), PacketReader(Buffers(), five=True)
    assert reader.begins(receive)
    return reader.read(receive)


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xff" + bytes(LARGE),  # a topic that is longer than the message
        b"\0\0" + bytes(LARGE),  # none
        b"\0\1\xff" + bytes(LARGE),  # no text
        b"\0\1a\xff\xff\xff\x7f" + bytes(LARGE),  # properties that are longer than the message
        b"\0\1a\xff\xff\xff\xff" + bytes(LARGE),  # and that do not end
    ],
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedPacketError):
        read(b"\x30" + varint(len(body)) + body)


def test_the_end_of_the_connection_is_told() -> None:
    reader = PacketReader(Buffers(), five=True)
    with pytest.raises(EOFError):
        reader.begins(lambda _view: 0)


def test_what_is_larger_than_any_chunk_is_left_for_the_library() -> None:
    reader = PacketReader(Buffers(), five=True)
    data = publish(bytes(BUFFER))[:1000]
    assert not reader.begins(at_once(data))


def test_memory_is_used_again_once_it_was_let_go() -> None:
    buffers = Buffers()
    one, two = buffers.take(), buffers.take()
    assert one is not two
    buffers.give(one)
    assert buffers.take() is one


@pytest.mark.parametrize("qos", [0, 1])
def test_the_library_reads_by_us_and_acknowledges(qos: int) -> None:
    """What `_Client` relies on is still there in the library that is installed."""
    ours, theirs = socket.socketpair()
    came: list[Any] = []
    try:
        client = _Client(came.append, Buffers(), client_id="x", protocol=MQTTProtocolVersion.MQTTv5)
        small: list[bytes] = []
        client.on_message = lambda _client, _data, message: small.append(bytes(message.payload))
        client._sock = ours
        ours.setblocking(False)
        payload = random.Random(2).randbytes(60_000)
        theirs.sendall(publish(b"one") + publish(payload, qos=qos) + publish(b"two"))
        for _ in range(20):
            assert client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
        assert small == [b"one", b"two"]
        assert [(type(one), one.topic, bytes(one.payload)) for one in came] == [(MqttChunk, TOPIC, payload)]
        client.loop_write()
        theirs.settimeout(1)
        if qos:
            assert theirs.recv(10)[:4] == b"\x40\x02\x00\x05"
    finally:
        ours.close()
        theirs.close()
