"""What `shoal broker config` writes works: real Mosquitto, and a real NATS server where one is installed."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from agent.keys import new_key, signing_request
from agent.protocol.topics import DeviceTopic, alerts_topic, broadcast_topic, device_topic
from fleet_server.enrolment.ids import LISTENER_NAME, SERVER_NAME
from fleet_server.gateway.broker import find_mosquitto
from fleet_server.gateway.broker_configurations import BrokerKind, Place, files, subject
from fleet_server.trust.ca import key_pem
from tests.broker_peer import Peer, SecureServer, identity_of, secure_server
from tests.fleet import NATS, free_port, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    with secure_server(tmp_path_factory.mktemp("server")) as found:
        yield found


def written(server: SecureServer, folder: Path, kind: BrokerKind, devices: tuple[str, ...]) -> int:
    """The configuration and certificates in a folder, for a port that is given back."""
    key, port = new_key(), free_port()
    body = {"csr": signing_request(key, "127.0.0.1"), "names": ["127.0.0.1", "mqtt.example"]}
    issued = server.post("/server-certificates", body)
    texts = files(kind, Place(folder, "127.0.0.1", port), [(device, "default") for device in devices])
    texts |= {"server.key": key, "server.pem": issued["certificate"], "ca.pem": issued["ca"], "crl.pem": issued["crl"]}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return port


@contextmanager
def running(command: list[str], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


def as_server(server: SecureServer, folder: Path, port: int, protocol: MQTTProtocolVersion) -> Peer:
    issued, key = server.app.state.authority.ca.issue_client(SERVER_NAME, "default", dt.timedelta(days=1))
    own = {"device_id": SERVER_NAME, "certificate": issued.pem, "ca": server.app.state.authority.ca.bundle}
    return Peer(server, folder, identity_of({**own, "broker": ""}, key_pem(key)), port=port, protocol=protocol)


def check(server: SecureServer, folder: Path, port: int, protocol: MQTTProtocolVersion) -> None:
    """A device's own topics work, and another's do not, in both directions."""
    fleet = as_server(server, folder / "as-server", port, protocol)
    one, two = (
        Peer(server, folder / name, server.identity(name), client_id=name, port=port, protocol=protocol)
        for name in (f"one-{port}", f"two-{port}")
    )
    wait_until("the broker", lambda: fleet.connect(2) or None, 20)
    assert one.connect()
    assert two.connect()
    own, other = f"one-{port}", f"two-{port}"
    for peer, topics in (
        (fleet, [device_topic(own, DeviceTopic.REPORTED), device_topic(other, DeviceTopic.REPORTED)]),
        (one, [device_topic(own, DeviceTopic.DESIRED), broadcast_topic("a" * 64, 0)]),
        (two, [device_topic(own, DeviceTopic.DESIRED), "#", "shoal/v1/#"]),
    ):
        for topic in topics:
            peer.client.subscribe(topic, 1)
            peer.granted.get(timeout=10)
    for topic in (device_topic(own, DeviceTopic.DESIRED), broadcast_topic("a" * 64, 0)):
        fleet.client.publish(topic, b"fleet", qos=1)
        assert one.messages.get(timeout=10).topic == topic
    two.client.publish(device_topic(own, DeviceTopic.REPORTED), b"forged", qos=1)
    two.client.publish(device_topic(own, DeviceTopic.DESIRED), b"forged", qos=1)
    one.client.publish(device_topic(own, DeviceTopic.REPORTED), b"mine", qos=1)
    assert fleet.messages.get(timeout=10).payload == b"mine"
    time.sleep(0.3)
    assert fleet.messages.empty()
    assert one.messages.empty()
    assert [message for message in list(two.messages.queue) if f"/d/{own}/" in message.topic] == []
    listen(server, folder, port, protocol, fleet, one)
    for peer in (fleet, one, two):
        peer.close()
    assert not Peer(server, folder / "none", None, port=port, protocol=protocol).connect(2)


def listen(
    server: SecureServer, folder: Path, port: int, protocol: MQTTProtocolVersion, fleet: Peer, device: Peer
) -> None:
    """A program with a certificate for it hears alerts of every fleet, hears nothing of devices and says nothing."""
    key = new_key()
    issued = server.post("/server-certificates", {"csr": signing_request(key, "anybody"), "purpose": "alerts"})
    own = {"device_id": LISTENER_NAME, "certificate": issued["certificate"], "ca": issued["ca"], "broker": ""}
    program = Peer(server, folder / "program", identity_of(own, key), client_id="program", port=port, protocol=protocol)
    assert program.connect()
    alerts = alerts_topic("default")
    for peer, topics in (
        (program, [alerts_topic("+"), device_topic("one", DeviceTopic.REPORTED), "shoal/v1/b/+/+"]),
        (device, [alerts_topic("+")]),
        (fleet, [device_topic("one", DeviceTopic.REPORTED), alerts]),
    ):
        for topic in topics:
            peer.client.subscribe(topic, 1)
            peer.granted.get(timeout=10)
    program.client.publish(device_topic("one", DeviceTopic.REPORTED), b"forged", qos=1)
    program.client.publish(alerts, b"forged", qos=1)
    fleet.client.publish(device_topic("one", DeviceTopic.REPORTED), b"report", qos=1)
    fleet.client.publish(broadcast_topic("b" * 64, 0), b"chunk", qos=1)
    fleet.client.publish(alerts, b"alert", qos=1)
    assert program.messages.get(timeout=10).payload == b"alert"
    heard = {fleet.messages.get(timeout=10).payload for _ in range(2)}
    assert heard == {b"report", b"alert"}
    time.sleep(0.3)
    assert program.messages.empty()
    assert fleet.messages.empty()
    assert b"alert" not in {message.payload for message in list(device.messages.queue)}
    while not device.messages.empty():
        device.messages.get()
    program.close()


def test_mosquitto(server: SecureServer, tmp_path: Path) -> None:
    port = written(server, tmp_path, BrokerKind.MOSQUITTO, ())
    if os.geteuid() == 0:
        with (tmp_path / "mosquitto.conf").open("a") as file:
            file.write("user root\n")
    executable, more = find_mosquitto("mosquitto")
    with running([executable, "-c", str(tmp_path / "mosquitto.conf")], {**os.environ, **more}):
        check(server, tmp_path, port, MQTTProtocolVersion.MQTTv5)


@pytest.mark.skipif(NATS is None, reason="nats-server is not installed")
def test_nats(server: SecureServer, tmp_path: Path) -> None:
    port = written(server, tmp_path, BrokerKind.NATS, ())
    assert NATS is not None
    listed = tuple(f"{name}-{port}" for name in ("one", "two"))
    text = files(BrokerKind.NATS, Place(tmp_path, "127.0.0.1", port), [(name, "default") for name in listed])[
        "nats.conf"
    ]
    (tmp_path / "nats.conf").write_text(text.replace("127.0.0.1:4222", f"127.0.0.1:{free_port()}"))
    subprocess.run([NATS, "-t", "-c", str(tmp_path / "nats.conf")], check=True, capture_output=True)
    with running([NATS, "-c", str(tmp_path / "nats.conf")]) as process:
        check(server, tmp_path, port, MQTTProtocolVersion.MQTTv311)
        # A device that is listed no longer is out.
        gone = Peer(
            server,
            tmp_path / "gone",
            server.identity(f"three-{port}"),
            port=port,
            client_id="three",
            protocol=MQTTProtocolVersion.MQTTv311,
        )
        assert not gone.connect(2)
        assert process.poll() is None


def test_subjects_of_nats() -> None:
    assert subject("shoal/v1/3/d/cam.1/desired") == "shoal.v1.3.d.cam//1.desired"


def test_vernemq_s_files_name_what_is_there(tmp_path: Path) -> None:
    texts = files(BrokerKind.VERNEMQ, Place(tmp_path, "0.0.0.0", 8883), [])
    lines = dict(line.split(" = ", 1) for line in texts["vernemq.conf"].splitlines() if " = " in line)
    assert lines["listener.ssl.default.require_certificate"] == "on"
    paths = {Path(value).name for value in lines.values() if value.startswith(str(tmp_path))}
    assert paths == {"acl", "ca.pem", "server.pem", "server.key", "crl.pem"}
    assert f"user {SERVER_NAME}" in texts["acl"]
