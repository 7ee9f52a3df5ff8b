"""SIGKILL of server, broker or agent in the middle of a deployment: started again, the deployment finishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier

HIDDEN = 1200  # 6 MB of weights
MB_S = "2"  # long enough on the wire to be killed on the way
VICTIMS = ("server", "broker", "dev-1")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A device, and a version for each that is killed."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"), external_broker=True)
    try:
        fleet.start_broker()
        start_server(fleet)
        fleet.start_agent("dev-1")
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        for seed, victim in enumerate(VICTIMS):
            write_classifier(fleet.folder / f"{victim}.onnx", seed=seed, hidden=HIDDEN)
            fleet.push("big", victim, fleet.folder / f"{victim}.onnx")
            (variant,) = fleet.build(f"big@{victim}", "any")
            assert variant["state"] == "ready", variant
        yield fleet
    finally:
        fleet.stop()


def start_server(fleet: LocalFleet) -> None:
    fleet.start_server(SHOAL_DELIVERY_MB_S=MB_S)


def downloading(fleet: LocalFleet, digest: str) -> bool:
    """Whether the agent has some of the artifact on its disk, and not all."""
    size = HIDDEN * HIDDEN * 4
    parts = [path.stat().st_blocks * 512 for path in (fleet.folder / "dev-1").rglob(f"{digest}.part")]
    return any(size * 0.02 < part < size * 0.9 for part in parts)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_deployment_survives_a_kill(fleet: LocalFleet, victim: str) -> None:
    wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["online"] and d["profile"]])
    (variant,) = fleet.get("/variants", version=f"big@{victim}")["items"]
    rollout = fleet.rollout(f"big@{victim}")
    wait_until("a part of the artifact on the device", lambda: downloading(fleet, variant["digest"]), 60)
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
    answer = fleet.infer("dev-1", "big", row)
    assert answer["model_version"] == victim
    assert int(np.argmax(answer["outputs"][0]["data"])) == 1
