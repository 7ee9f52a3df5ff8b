"""Signed models with real processes: keys leave the server, a rollout waits for signatures, a device refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from fleet_server.cli.main import app
from tests.cli import CliRunner
from tests.fleet import LocalFleet, wait_until, write_classifier


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        fleet.start_agent("dev-1")
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"]])
        write_classifier(fleet.folder / "one.onnx")
        write_classifier(fleet.folder / "two.onnx", seed=1)
        yield fleet
    finally:
        fleet.stop()


def shoal(fleet: LocalFleet, *arguments: str, status: int = 0) -> str:
    environment = {"SHOAL_TOKEN": fleet.token, "COLUMNS": "100", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, ["--url", fleet.url, "trust", *arguments], env=environment)
    assert done.exit_code == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_from_the_servers_keys_to_ones_own(fleet: LocalFleet) -> None:
    assert "INSECURE" in fleet.log("server")
    fleet.push("m", "1", fleet.folder / "one.onnx")
    assert fleet.build("m@1", "any")[0]["state"] == "ready"
    first = fleet.rollout("m@1")
    wait_until("the first rollout", lambda: fleet.rollout_state(first) == "succeeded")
    assert "INSECURE" in fleet.log("dev-1"), "trust on first use is said loudly"
    trusted = {path.name for path in (fleet.folder / "dev-1" / "trust").iterdir()}
    assert {"timestamp.json", "snapshot.json", "targets.json", "model.m.json"} <= trusted

    alice, bob = str(fleet.folder / "alice"), str(fleet.folder / "bob")
    shoal(fleet, "init", "--keys", alice, "--keys", bob, "--threshold", "2", "--yes")
    roles = {one["role"]: one for one in fleet.get("/trust")["roles"]}
    assert [roles[name]["online"] for name in ("root", "targets", "snapshot", "timestamp")] == [
        False,
        False,
        True,
        True,
    ]
    assert roles["model.m"]["threshold"] == 2
    assert "elsewhere" in shoal(fleet, "status")

    fleet.push("m", "2", fleet.folder / "two.onnx")
    assert fleet.build("m@2", "any")[0]["state"] == "ready"
    wanted = {"version": "m@2", "target": {"all": True}, "allow_unproven": True}
    refused = fleet.post("/rollouts", wanted, status=409)
    assert refused["code"] == "unsigned"
    assert "shoal trust sign" in refused["detail"]
    measured = fleet.post("/gate-runs", {"version": "m@2", "profile": "any"}, status=409)
    assert measured["code"] == "unsigned"
    shown = shoal(fleet, "sign", "--keys", alice, "--yes")
    assert "m@2" in shown
    assert "to serve" in shown
    assert fleet.post("/rollouts", wanted, status=409)["code"] == "unsigned"
    shoal(fleet, "sign", "--keys", bob, "--yes")
    second = fleet.rollout("m@2", strategy={"stages": [{"percent": 100}]})
    wait_until("the second rollout", lambda: fleet.rollout_state(second) == "succeeded")
    shoal(fleet, "rotate", "timestamp", "--keys", alice, "--keys", bob, "--yes")
    assert json.loads(shoal(fleet, "root"))["signed"]["version"] == 3
