"""Devices enrol over HTTPS, connect by mutual TLS, and are locked out: real server, broker and agents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier


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
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"identity.json": "0o600"}
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
    spent = fleet.enroll("cam-2", token=token)
    assert spent.returncode == 2
    assert "used up" in spent.stderr
