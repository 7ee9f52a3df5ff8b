"""Both links on brokers that speak MQTT 3.1.1 only: a real Mosquitto behind a peer that refuses what is newer."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.config import Config
from agent.mqtt import LinkUp, MqttMessage
from agent.mqtt import MqttLink as AgentLink
from agent.protocol.topics import FROM_DEVICE, DeviceTopic, broadcast_topic, device_topic, every_shard_filter
from fleet_server.gateway.broker import find_mosquitto
from fleet_server.gateway.inbox import Message
from fleet_server.gateway.mqtt import IN_FLIGHT
from fleet_server.gateway.mqtt import MqttLink as ServerLink
from tests.fleet import free_port, wait_until
from tests.old_broker import old_broker

CONNACK_3 = b"\x20\x02\x00\x01"  # unacceptable protocol version, as a broker that knows no MQTT 5 says it
CONNACK_5 = b"\x20\x03\x00\x84\x00"  # the same in the words of MQTT 5
SAID = "the broker does not speak MQTT 5: connected by 3.1.1"


@pytest.fixture(scope="module")
def broker_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    config = tmp_path_factory.mktemp("broker") / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    executable, more = find_mosquitto("mosquitto")
    with subprocess.Popen([executable, "-c", str(config)], env={**os.environ, **more}, stderr=subprocess.DEVNULL) as it:
        try:
            yield port
        finally:
            it.terminate()


@pytest.mark.parametrize("answer", [CONNACK_3, CONNACK_5, b""], ids=["refused", "refused by 5", "closed"])
def test_device_and_server_meet_on_an_old_broker(
    broker_port: int, answer: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    name = f"old-{len(answer)}"
    heard: queue.Queue[Message] = queue.Queue()
    events: queue.Queue[LinkUp | MqttMessage] = queue.Queue()
    with old_broker(broker_port, answer) as peer:
        url = f"mqtt://127.0.0.1:{peer.port}"
        filters = [every_shard_filter(leaf) for leaf in sorted(FROM_DEVICE)]
        server = ServerLink(url, f"server-{name}", filters, heard.put)
        device = AgentLink(Config(name, tmp_path, broker=url), "boot", events.put)
        server.start()
        wait_until("the server", lambda: server.connected, 10)
        device.start()
        assert events.get(timeout=10) == LinkUp(0)
        wait_until("the report", lambda: device.publish(DeviceTopic.REPORTED, b"{}") is not None, 5)
        while heard.get(timeout=5) != Message(device_topic(name, DeviceTopic.REPORTED), b"{}"):
            pass  # presence that the broker kept, of this device and others
        acknowledged = threading.Event()
        desired = device_topic(name, DeviceTopic.DESIRED)
        assert server.publish(desired, b"first", retain=True, acknowledged=acknowledged.set)
        assert acknowledged.wait(5)
        assert events.get(timeout=5) == MqttMessage(desired, b"first")
        device.listen_to_broadcast("a" * 64)
        wait_until("the chunk", lambda: server.publish(broadcast_topic("a" * 64, 3), b"c") and not events.empty(), 5)
        assert events.get(timeout=5) == MqttMessage(broadcast_topic("a" * 64, 3), b"c")
        # What was found out holds: the next connection is by 3.1.1 at once.
        before = len(peer.levels)
        device.reconnect()
        wait_until("the device again", lambda: device.connected, 10)
        assert peer.levels[before:] == [4]
        device.stop()
        server.stop()
    assert [record.message for record in caplog.records if record.levelno >= logging.INFO].count(SAID) == 2
    assert peer.levels.count(5) == (2 if answer else 4)


@pytest.mark.parametrize("version", [5, 4])
def test_a_session_outlives_the_connection_where_it_also_ends_some_day(
    broker_port: int, version: int, tmp_path: Path
) -> None:
    """By MQTT 5. By 3.1.1 nothing is left in it, for it would lie there for ever: what matters is said again."""
    name = f"away-{version}"
    events: queue.Queue[LinkUp | MqttMessage] = queue.Queue()
    topic = device_topic(name, DeviceTopic.CERTIFICATE)
    with old_broker(broker_port, CONNACK_3) as peer:
        url = f"mqtt://127.0.0.1:{peer.port if version == 4 else broker_port}"
        device = AgentLink(Config(name, tmp_path, broker=url), "boot", events.put)
        device.start()
        assert events.get(timeout=10) == LinkUp(0)
        wait_until("its first word", lambda: device.publish(DeviceTopic.REPORTED, b"{}") is not None, 5)
        device.stop()
        server = ServerLink(url, f"server-{name}", ["shoal/v1/none"], lambda _message: None)
        server.start()
        wait_until("the server", lambda: server.connected, 10)
        acknowledged = threading.Event()
        assert server.publish(topic, b"while it was away", acknowledged=acknowledged.set)
        assert acknowledged.wait(5)
        again = AgentLink(Config(name, tmp_path, broker=url), "boot", events.put)
        again.start()
        found: list[LinkUp | MqttMessage] = []
        while MqttMessage(topic, b"now") not in found:
            if LinkUp(0) in found:
                server.publish(topic, b"now")
            with contextlib.suppress(queue.Empty):
                found.append(events.get(timeout=0.2))
        assert (MqttMessage(topic, b"while it was away") in found) is (version == 5)
        again.stop()
        server.stop()


def test_a_broker_replaced_by_an_older_one_does_not_hold_up_what_it_never_acknowledged(broker_port: int) -> None:
    acknowledged: queue.Queue[str] = queue.Queue()
    with old_broker(broker_port, CONNACK_5) as peer:
        peer.newest = 5
        server = ServerLink(f"mqtt://127.0.0.1:{peer.port}", "server-moved", ["shoal/v1/none"], lambda _message: None)
        server.start()
        wait_until("the server", lambda: server.connected, 10)
        peer.deaf = True
        for _ in range(IN_FLIGHT):
            assert server.publish("shoal/v1/x", b"lost", acknowledged=lambda: acknowledged.put("lost"))
        peer.newest, peer.deaf = 4, False
        peer.cut()
        wait_until("the server by 3.1.1", lambda: server.connected and peer.levels == [5, 5, 4], 10)
        for _ in range(2 * IN_FLIGHT):
            assert server.publish("shoal/v1/x", b"kept", acknowledged=lambda: acknowledged.put("kept"))
        assert {acknowledged.get(timeout=5) for _ in range(2 * IN_FLIGHT)} == {"kept"}
        server.stop()
