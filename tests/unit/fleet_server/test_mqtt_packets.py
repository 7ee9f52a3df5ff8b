"""MQTT 3.1.1 as bytes, by the examples and rules of the standard."""

from __future__ import annotations

import pytest

from fleet_server.simulator import packets
from fleet_server.simulator.packets import Kind, Packet, PacketError, Reader, Received, Will

LONG = b"\x30\xac\x02\x00\x01t" + b"x" * 297  # a message of 300 bytes after its length
ANSWERS = b"\x20\x02\x01\x00" + b"\x40\x02\x00\x07" + LONG + b"\xd0\x00"


def test_connect_has_a_will_and_keeps_the_session() -> None:
    made = packets.connect("id", Will("t", b"w"), keepalive_s=60, user="u", password="p")
    assert made == b"\x10\x1a\x00\x04MQTT\x04\xec\x00\x3c\x00\x02id\x00\x01t\x00\x01w\x00\x01u\x00\x01p"
    assert packets.connect("id", Will("t", b"w"), keepalive_s=60)[9] == 0x2C


def test_what_a_device_says() -> None:
    assert packets.subscribe(1, [("a/+", 1), ("b", 0)]) == b"\x82\x0c\x00\x01\x00\x03a/+\x01\x00\x01b\x00"
    assert packets.unsubscribe(2, ["a"]) == b"\xa2\x05\x00\x02\x00\x01a"
    first = packets.publish("t", b"hello", 258, retain=True)
    assert first == b"\x33\x0a\x00\x01t\x01\x02hello"
    assert packets.again(first) == b"\x3b" + first[1:]
    assert packets.acknowledge(258) == b"\x40\x02\x01\x02"
    assert packets.publish("t", b"x" * 300, 1)[1:3] == b"\xb1\x02"


@pytest.mark.parametrize("step", [1, 2, 3, 7, len(ANSWERS)])
def test_packets_are_whole_however_they_come(step: int) -> None:
    reader = Reader()
    parts = [ANSWERS[start : start + step] for start in range(0, len(ANSWERS), step)]
    found = [packet for part in parts for packet in reader.feed(part)]
    assert [one.kind for one in found] == [Kind.CONNACK, Kind.PUBACK, Kind.PUBLISH, Kind.PINGRESP]
    assert packets.read_connack(found[0]) == (True, 0)
    assert packets.read_packet_id(found[1]) == 7
    assert packets.read_publish(found[2]) == Received("t", b"x" * 297, 0)


def test_a_message_to_be_acknowledged_has_an_id() -> None:
    (packet,) = Reader().feed(packets.publish("täg", b"", 9))
    assert packets.read_publish(packet) == Received("täg", b"", 9)


@pytest.mark.parametrize(
    "data", [b"\x00\x00", b"\x10\x00", b"\xf0\x00", b"\x30\xff\xff\xff\xff\x01", b"\x30\xff\xff\xff\x7f"]
)
def test_what_no_broker_sends_is_an_error(data: bytes) -> None:
    with pytest.raises(PacketError):
        list(Reader().feed(data))


@pytest.mark.parametrize(
    ("read", "packet"),
    [
        (packets.read_connack, Packet(Kind.CONNACK, 0, b"\x00")),
        (packets.read_connack, Packet(Kind.PUBLISH, 0, b"\x00\x00")),
        (packets.read_publish, Packet(Kind.PUBLISH, 4, b"\x00\x01t\x00\x01")),
        (packets.read_publish, Packet(Kind.PUBLISH, 0, b"\x00\x09t")),
        (packets.read_publish, Packet(Kind.PUBLISH, 2, b"\x00\x01t\x00")),
        (packets.read_publish, Packet(Kind.PUBLISH, 0, b"\x00\x01\xff")),
        (packets.read_publish, Packet(Kind.PUBLISH, 0, b"\x00")),
        (packets.read_packet_id, Packet(Kind.PUBACK, 0, b"\x00")),
    ],
)
def test_damaged_packets_are_an_error(read: object, packet: Packet) -> None:
    with pytest.raises(PacketError):
        read(packet)  # type: ignore[operator]
