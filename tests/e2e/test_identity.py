"""Devices enrol over HTTPS, connect by mutual TLS, and are locked out: real server, broker and agents."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet_server.cli.main import app
from tests.cli import CliRunner, Result
from tests.fleet import AGENT, LocalFleet, wait_until, write_classifier


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"), tls=True)
    try:
        fleet.start_server()
        yield fleet
    finally:
        fleet.stop()


def online(fleet: LocalFleet, device: str) -> bool:
    return any(one["id"] == device and one["online"] for one in fleet.get("/devices")["items"])


def test_a_device_enrols_by_a_token_and_runs_what_is_desired(fleet: LocalFleet, tmp_path: Path) -> None:
    fleet.post("/profiles", {"name": "edge", "runtime": "onnx", "precisions": ["fp32"]})
    token = fleet.post("/enrolment-tokens", {"tags": {"site": "plant7"}})["token"]
    done = fleet.enroll("cam-1", token=token)
    assert done.returncode == 0, done.stderr
    assert f"mqtts://127.0.0.1:{fleet.broker_port}" in done.stdout
    folder = fleet.folder / "cam-1" / "identity"
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {
        "identity.json": "0o600",
        "identity.copy.json": "0o600",
    }
    fleet.start_agent("cam-1")
    wait_until("the device", lambda: online(fleet, "cam-1"))
    found = fleet.get("/devices/cam-1")
    assert found["tags"] == {"site": "plant7"}
    source = tmp_path / "tri.onnx"
    write_classifier(source)
    fleet.push("tri", "1", source)
    assert fleet.build("tri@1", "edge")[0]["state"] == "ready"
    rollout = fleet.rollout("tri@1")
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    scores = np.array(fleet.infer("cam-1", "tri", np.eye(8, dtype=np.float32)[:3])["outputs"][0]["data"])
    assert scores.reshape(3, 3).argmax(1).tolist() == [0, 1, 2]
    broker = tmp_path / "broker"
    written = shoal(fleet, "broker", "config", "--kind", "mosquitto", "--out", str(broker), "--name", "mqtt.example")
    assert written.exit_code == 0, written.output
    assert "BEGIN CERTIFICATE" in (broker / "server.pem").read_text()
    spent = fleet.enroll("cam-2", token=token)
    assert spent.returncode == 2
    assert "used up" in spent.stderr


def shoal(fleet: LocalFleet, *arguments: str) -> Result:
    """The command line in this process, which is quicker."""
    reached = {"SHOAL_URL": fleet.url, "SHOAL_CA_FILE": str(fleet.ca_file), "SHOAL_TOKEN": fleet.token}
    environment = {**reached, "COLUMNS": "80", "NO_COLOR": "1"}
    return CliRunner().invoke(app, arguments, env=environment)


def test_a_device_without_a_token_waits_until_its_key_is_approved(fleet: LocalFleet) -> None:
    pin = json.loads(shoal(fleet, "device", "ca", "-o", "json").output)["pin"]
    with subprocess.Popen(
        [*AGENT, "enroll", "--server", fleet.url, "--ca-pin", pin, "--wait", "60"],
        env={**os.environ, **fleet.agent_variables("hand-1")},
        stdout=subprocess.PIPE,
        text=True,
    ) as waiting:
        (request,) = wait_until("the request", lambda: pending(fleet), 30)
        assert waiting.stdout is not None
        assert request["key_sha256"] in waiting.stdout.readline()
        assert request["id"] in waiting.stdout.readline()
        assert shoal(fleet, "device", "approve", request["id"]).exit_code == 0
        assert waiting.wait(30) == 0
    assert pending(fleet) == []
    assert (fleet.folder / "hand-1" / "identity" / "identity.json").exists()
    assert shoal(fleet, "device", "revoke", "hand-1").exit_code == 2, "nobody is asked without --yes"
    assert shoal(fleet, "device", "revoke", "hand-1", "--yes").exit_code == 0
    shown = json.loads(shoal(fleet, "device", "identity", "hand-1", "-o", "json").output)
    assert all(one["revoked_at"] for one in shown["certificates"])


def pending(fleet: LocalFleet) -> Any:
    return json.loads(shoal(fleet, "device", "pending", "-o", "json").output)


def test_a_server_that_is_not_the_pinned_one_gets_no_token(fleet: LocalFleet) -> None:
    made = json.loads(shoal(fleet, "device", "token", "create", "--ttl", "5m", "-o", "json").output)
    start, pin, secret = made["token"].split(".")
    other = ("0" if pin[0] != "0" else "1") + pin[1:]
    refused = fleet.enroll("pin-1", token=f"{start}.{other}.{secret}")
    assert refused.returncode == 2
    assert "not the one that the token" in refused.stderr
    plain = fleet.enroll("pin-1", token=made["token"], server="http://fleet.example:1")
    assert "over TLS only" in plain.stderr
    assert [one["uses_left"] for one in fleet.get("/enrolment-tokens")["items"] if one["id"] == made["id"]] == [1]
    unverified = fleet.enroll("pin-1", "--ca-file", str(Path(__file__)), token=made["token"])
    assert "--ca-file" in unverified.stderr
