"""SIGKILL of server, broker or agent in the middle of a deployment: started again, the deployment finishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier

HIDDEN = 4000  # 64 MB of weights: long enough on the wire to be killed on the way


@pytest.fixture(scope="module")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "big.onnx"
    write_classifier(path, hidden=HIDDEN)
    return path


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path, external_broker=True)
    try:
        fleet.start_broker()
        start_server(fleet)
        fleet.start_agent("dev-1")
        yield fleet
    finally:
        fleet.stop()


def start_server(fleet: LocalFleet) -> None:
    """Nothing is compressed first: of 64 MB that takes most of a test's time."""
    fleet.start_server(SHOAL_DELTAS="false")


def downloading(fleet: LocalFleet) -> bool:
    """Whether the agent has some of the artifact on its disk, and not all."""
    state = fleet.folder / "dev-1"
    size = HIDDEN * HIDDEN * 4
    parts = [path.stat().st_blocks * 512 for path in state.rglob("*") if path.is_file() and "part" in path.name]
    return any(size * 0.02 < part < size * 0.9 for part in parts)


@pytest.mark.parametrize("victim", ["server", "broker", "dev-1"])
def test_a_deployment_survives_a_kill(fleet: LocalFleet, big_model: Path, victim: str) -> None:
    fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
    fleet.push("big", "1", big_model)
    variant = fleet.build("big@1", "any")[0]
    assert variant["state"] == "ready", variant
    wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["online"] and d["profile"]])
    rollout = fleet.rollout("big@1")
    wait_until("a part of the artifact on the device", lambda: downloading(fleet), 60)
    fleet.kill(victim)
    starts: dict[str, Callable[[], None]] = {
        "server": lambda: start_server(fleet),
        "broker": fleet.start_broker,
        "dev-1": lambda: fleet.start_agent("dev-1"),
    }
    starts[victim]()
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded", 150)
    (deployment,) = fleet.deployments(rollout)
    assert deployment["phase"] == "active"
    row = np.array([[0.1, 0.9, 0.2, 0, 0, 0, 0, 0]], np.float32)
    scores = fleet.infer("dev-1", "big", row)["outputs"][0]["data"]
    assert int(np.argmax(scores)) == 1
