"""A device with a valid certificate that attacks: refused or bounded, others unharmed, an alert raised."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from agent.keys import new_key, signing_request
from agent.protocol.codec import encode
from agent.protocol.topics import FROM_DEVICE, DeviceTopic, device_topic, shard_of
from fleet_server import outbox
from fleet_server.db import Database
from fleet_server.models import Device
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.trust.ca import FleetCa, read_request
from tests.broker_peer import Peer, SecureServer, identity_of, secure_server
from tests.fleet import wait_until
from tests.integration.test_device_messages import HELLO

EVIL, VICTIM = "evil-1", "victim-1"
MILLION = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    with secure_server(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def victim(server: SecureServer, folder: Path) -> Iterator[Peer]:
    peer = Peer(server, folder / VICTIM, server.identity(VICTIM))
    assert peer.connect()
    assert peer.subscribe(device_topic(VICTIM, DeviceTopic.DESIRED))
    yield peer
    assert peer.lost.empty(), "it lost its connection"
    peer.close()


@pytest.fixture(scope="module")
def evil_identity(server: SecureServer):
    return server.identity(EVIL)


@pytest.fixture
def evil(server: SecureServer, folder: Path, evil_identity, victim: Peer) -> Iterator[Peer]:
    peer = Peer(server, folder / EVIL, evil_identity, client_id=VICTIM)
    assert peer.connect()
    yield peer
    peer.close()


def tell(server: SecureServer, device: str, text: bytes) -> None:
    database: Database = server.app.state.database
    with database.write() as session:
        topic = device_topic(device, DeviceTopic.DESIRED)
        outbox.enqueue(session, fleet_id=DEFAULT_FLEET, topic=topic, payload=text, retain=True)


def reported(server: SecureServer, device: str) -> int | None:
    database: Database = server.app.state.database
    with database.read() as session:
        row = session.get(Device, device)
        return row.reported_sequence if row else None


def say(peer: Peer, device: str, sequence: int) -> bool:
    message = encode(msgspec.structs.replace(HELLO, sequence=sequence))
    return peer.publish(device_topic(device, DeviceTopic.REPORTED), message)


def test_it_hears_nothing_that_is_another_device_s(server: SecureServer, evil: Peer, victim: Peer) -> None:
    for topic in ("#", "shoal/v1/#", "shoal/v1/+/d/+/desired", device_topic(VICTIM, DeviceTopic.DESIRED), "$SYS/#"):
        evil.client.subscribe(topic, 1)
        evil.granted.get(timeout=10)
    tell(server, VICTIM, b"for the victim")
    tell(server, EVIL, b"for the other")
    assert victim.messages.get(timeout=10).payload == b"for the victim"
    while not evil.messages.get(timeout=10).topic.endswith(f"/{EVIL}/desired"):
        raise AssertionError("it heard what is another's")
    time.sleep(0.3)
    assert {message.topic.split("/")[4] for message in evil.messages.queue} <= {EVIL}


def test_it_can_not_speak_for_another(
    server: SecureServer, folder: Path, evil: Peer, victim: Peer, evil_identity
) -> None:
    for leaf in FROM_DEVICE:
        assert not evil.publish(device_topic(VICTIM, leaf), encode(HELLO))
    for topic in (device_topic(EVIL, DeviceTopic.DESIRED), f"shoal/v1/b/{'a' * 64}/0", "shoal/v1/x", "$SYS/x"):
        assert not evil.publish(topic, b"x", retain=True)
    assert say(evil, EVIL, 1)
    wait_until("its own report", lambda: reported(server, EVIL) == 1, 10)
    assert reported(server, VICTIM) is None
    will = Peer(server, folder / "will", evil_identity, will=device_topic(VICTIM, DeviceTopic.PRESENCE))
    assert will.connect()
    with_will = ReasonCode(PacketTypes.DISCONNECT, identifier=4)
    will.client.disconnect(reasoncode=with_will)
    will.client.loop_stop()
    time.sleep(1.5)  # as long as it takes to note a message that can't be read, which the will is
    assert server.get(f"/devices/{VICTIM}/identity")["conduct"] is None


def test_nobody_comes_in_without_a_certificate_of_the_fleet(server: SecureServer, folder: Path) -> None:
    assert not Peer(server, folder / "none", None).connect(3)
    key = new_key()
    foreign = FleetCa.open(folder / "ca", "other")
    issued = foreign.issue_device(read_request(signing_request(key, VICTIM)), VICTIM, "other", dt.timedelta(days=1))
    own = server.app.state.authority.ca.bundle
    given = {"device_id": VICTIM, "certificate": issued.pem, "ca": own, "broker": ""}
    assert not Peer(server, folder / "foreign", identity_of(given, key)).connect(3)


def test_malformed_messages_are_counted_and_an_alert_is_raised(server: SecureServer, evil: Peer) -> None:
    for leaf, payload in (
        (DeviceTopic.TELEMETRY, b"\xdd\xff\xff\xff\xff" * 10),
        (DeviceTopic.TELEMETRY, b"\x81" * 100_000),
        (DeviceTopic.REPORTED, b"[" * 100_000),
        (DeviceTopic.NEED, b"{}"),
        (DeviceTopic.RENEW, b"null"),
    ):
        assert evil.publish(device_topic(EVIL, leaf), payload)

    def counted(count: int) -> bool:
        conduct = server.get(f"/devices/{EVIL}/identity")["conduct"]
        return conduct is not None and conduct["malformed"] == count

    wait_until("the first", lambda: counted(5), 15)  # of reports that wait together only the last is looked at
    assert evil.publish(device_topic(EVIL, DeviceTopic.REPORTED), b'{"facts": \xff\xfe}')
    wrong_shard = f"shoal/v1/{(shard_of(EVIL) + 1) % 64}/d/{EVIL}/reported"
    assert evil.publish(wrong_shard, encode(HELLO))

    wait_until("the count", lambda: counted(7), 15)
    events = server.get("/audit-events?limit=100")["items"]
    (alert,) = [one for one in events if one["action"] == "device.misbehaves"]
    assert alert["subject"] == f"device/{EVIL}"


def test_a_flood_delays_nobody_else(server: SecureServer, evil: Peer, victim: Peer) -> None:
    topic = device_topic(EVIL, DeviceTopic.REPORTED)
    payload = encode(msgspec.structs.replace(HELLO, sequence=1, boot_id="flood"))
    for _ in range(4000):
        evil.client.publish(topic, payload, qos=0)
    began = time.monotonic()
    assert say(victim, VICTIM, 1)
    wait_until("the victim's report", lambda: reported(server, VICTIM) == 1, 20)
    assert time.monotonic() - began < 10
    wait_until("the count", lambda: server.get(f"/devices/{EVIL}/identity")["conduct"]["flooded"] > 100, 30)


def test_a_message_of_100_mb_ends_its_own_connection(server: SecureServer, evil: Peer, victim: Peer) -> None:
    memory = broker(server).memory_info().rss
    evil.client.publish(device_topic(EVIL, DeviceTopic.REPORTED), bytes(100_000_000), qos=1)
    evil.lost.get(timeout=20)
    assert say(victim, VICTIM, 2)
    wait_until("the victim's report", lambda: reported(server, VICTIM) == 2, 10)
    assert broker(server).memory_info().rss - memory < 32e6


def test_many_topics_stay_nowhere(server: SecureServer, evil: Peer, victim: Peer) -> None:
    """Ten thousand, then one that is too deep; the long form has a million."""
    memory = broker(server).memory_info().rss
    many_topics(evil, 10_000)
    evil.client.publish("shoal/" + "a/" * 500, b"x")
    evil.lost.get(timeout=10)
    assert say(victim, VICTIM, 3)
    wait_until("the victim's report", lambda: reported(server, VICTIM) == 3, 10)
    assert broker(server).memory_info().rss - memory < 16e6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_topics_stay_nowhere(server: SecureServer, evil: Peer, victim: Peer) -> None:
    """Retained, below its own id and elsewhere, while another device reports: every report arrives in seconds."""
    server_here = psutil.Process()
    many_topics(evil, 20_000)  # so that what grows once, buffers and pools, has grown
    before = broker(server).memory_info().rss, server_here.memory_info().rss
    slowest = 0.0
    for round_ in range(MILLION // 20_000):
        many_topics(evil, 20_000, first=(round_ + 1) * 20_000)
        sequence = 1000 + round_
        began = time.monotonic()
        assert say(victim, VICTIM, sequence)
        wait_until("the victim's report", lambda sequence=sequence: reported(server, VICTIM) == sequence, 20)
        slowest = max(slowest, time.monotonic() - began)
    after = broker(server).memory_info().rss, server_here.memory_info().rss
    assert after[0] - before[0] < 16e6, "the broker grew"
    assert after[1] - before[1] < 64e6, "the server grew, with the attacker's own client in its process"
    assert slowest < 10
    assert victim.lost.empty()
    assert len(server.get("/devices?limit=100")["items"]) <= 2, "none became a device"


def many_topics(peer: Peer, count: int, first: int = 0) -> None:
    """Publish on so many topics that are nobody's, and wait until the broker has read them."""
    for number in range(first, first + count):
        below = f"{shard_of(EVIL)}/d/{EVIL}" if number % 2 else f"{number % 64}/d/{EVIL}-{number}"
        peer.client.publish(f"shoal/v1/{below}/t{number}", b"x" * 100, qos=0, retain=True)
    assert not peer.publish(device_topic(VICTIM, DeviceTopic.DESIRED), b"x")


def broker(server: SecureServer) -> psutil.Process:
    return psutil.Process(server.app.state.gateway.broker_pid)
