"""What the agent and the server started is killed under their hands: both go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier

ROW = np.eye(8, dtype=np.float32)[:1]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A device that serves m@1, a ready m@2, and a long probation."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server(SHOAL_PROBATION_S="4")
        fleet.start_agent("dev-1")
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"]])
        for version in ("1", "2"):
            write_classifier(fleet.folder / f"{version}.onnx", seed=int(version))
            fleet.push("m", version, fleet.folder / f"{version}.onnx")
            assert fleet.build(f"m@{version}", "any")[0]["state"] == "ready"
        first = fleet.rollout("m@1")
        wait_until("m@1", lambda: fleet.rollout_state(first) == "succeeded")
        yield fleet
    finally:
        fleet.stop()


def child(fleet: LocalFleet, parent: str, words: str) -> psutil.Process:
    children = psutil.Process(fleet.processes[parent].pid).children(recursive=True)
    return next(one for one in children if words in " ".join(one.cmdline()))


def version_that_answers(fleet: LocalFleet) -> str | None:
    try:
        return str(fleet.infer("dev-1", "m", ROW)["model_version"])
    except (AssertionError, httpx.HTTPError):
        return None


def test_a_killed_worker_is_back_with_its_model(fleet: LocalFleet) -> None:
    worker = child(fleet, "dev-1", "agent.serving.worker")
    worker.kill()
    wait_until("the worker's end", lambda: not worker.is_running())
    wait_until("an answer", lambda: version_that_answers(fleet) == "1", 30)
    assert child(fleet, "dev-1", "agent.serving.worker").pid != worker.pid
    (problem,) = wait_until("its word", lambda: fleet.get("/devices/dev-1")["problems"])
    assert problem["code"] == "worker_ended"
    assert "signal 9" in problem["detail"]


def test_a_version_whose_worker_dies_while_it_is_watched_is_taken_back(fleet: LocalFleet) -> None:
    rollout = fleet.rollout("m@2", strategy={"stages": [{"percent": 100}], "stop_when": []})
    wait_until("probation", lambda: version_that_answers(fleet) == "2")
    child(fleet, "dev-1", "agent.serving.worker").kill()
    wait_until("m@1 back", lambda: version_that_answers(fleet) == "1", 30)
    deployment = wait_until(
        "the report", lambda: [d for d in fleet.deployments(rollout) if d["phase"] == "rolled_back"]
    )[0]
    assert deployment["failure"]["code"] == "worker_crashed"
    serving = fleet.get("/devices/dev-1")["serving"]
    assert [one["version"] for one in serving] == ["1"]
    assert wait_until(
        "its end", lambda: fleet.rollout_state(rollout) != "running" and fleet.rollout_state(rollout)
    ) in {
        "stopped",
        "reverted",
    }


def test_an_artifact_that_was_damaged_on_the_disk_is_fetched_again(fleet: LocalFleet) -> None:
    fleet.kill("dev-1")
    artifacts = [path for path in (fleet.folder / "dev-1" / "artifacts").iterdir() if path.is_file()]
    for path in artifacts:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    fleet.start_agent("dev-1")
    wait_until("m@1 again", lambda: version_that_answers(fleet) == "1", 30)
    assert artifacts


def test_a_killed_broker_is_started_again_and_devices_come_back(fleet: LocalFleet, tmp_path: Path) -> None:
    child(fleet, "server", "mosquitto").kill()
    write_classifier(tmp_path / "model.onnx", seed=3)
    fleet.push("n", "1", tmp_path / "model.onnx")
    assert fleet.build("n@1", "any")[0]["state"] == "ready"
    rollout = fleet.rollout("n@1")
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    assert fleet.get("/devices/dev-1")["online"]
