"""What the server refuses: a clear error that names the field, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier, write_data


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server and one agent that stays offline after it has registered, so that its deployments stay unsettled."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        fleet.start_agent("dev-1")
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"]])
        fleet.kill("dev-1")
        yield fleet
    finally:
        fleet.stop()


def blobs(fleet: LocalFleet) -> int:
    """Files in the artifact store and half-written uploads."""
    server = fleet.folder / "server"
    return sum(1 for folder in ("artifacts", "uploads") for path in (server / folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["unknown", "truncated"])
def test_a_file_that_is_no_model(fleet: LocalFleet, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.onnx"
    write_classifier(path)
    content = path.read_bytes()
    path.write_bytes(b"this is no model" * 100 if kind == "unknown" else content[: len(content) // 2])
    before = blobs(fleet)
    problem = fleet.post(
        "/models/bad/versions",
        {"name": "1", "sources": [{"format": "onnx", "digest": fleet.upload(path)}]},
        status=422,
    )
    assert problem["problems"][0]["field"].startswith("sources")
    assert blobs(fleet) == before
    assert "bad" not in [model["name"] for model in fleet.get("/models")["items"]]


def test_a_model_whose_inputs_do_not_fit_its_calibration_data(fleet: LocalFleet, tmp_path: Path) -> None:
    write_classifier(tmp_path / "model.onnx")
    np.savez(tmp_path / "calibration.npz", x=np.zeros((10, 9), np.float32))
    write_data(tmp_path / "evaluation.npz", rows=10, seed=1)
    problem = fleet.post(
        "/models/misfit/versions",
        {
            "name": "1",
            "sources": [{"format": "onnx", "digest": fleet.upload(tmp_path / "model.onnx")}],
            "calibration": fleet.upload(tmp_path / "calibration.npz"),
            "evaluation": fleet.upload(tmp_path / "evaluation.npz"),
        },
        status=422,
    )
    assert problem["problems"][0]["field"] == "calibration"
    assert "9" in problem["detail"]
    assert "8" in problem["detail"]
    assert "misfit" not in [model["name"] for model in fleet.get("/models")["items"]]


def test_an_unknown_profile(fleet: LocalFleet, tmp_path: Path) -> None:
    write_classifier(tmp_path / "model.onnx", seed=4)
    fleet.push("known", "1", tmp_path / "model.onnx")
    problem = fleet.post("/variants", {"version": "known@1", "profiles": ["nowhere"]}, status=404)
    assert "nowhere" in problem["detail"]
    assert fleet.get("/variants", version="known@1")["items"] == []


def test_rollouts_to_nobody_and_to_busy_devices(fleet: LocalFleet, tmp_path: Path) -> None:
    write_classifier(tmp_path / "model.onnx", seed=5)
    fleet.push("busy", "1", tmp_path / "model.onnx")
    assert fleet.build("busy@1", "any")[0]["state"] == "ready"

    nobody = fleet.post("/rollouts", {"version": "busy@1", "target": {"tags": {"site": "nowhere"}}}, status=422)
    assert nobody["code"] == "no_device"
    assert fleet.get("/rollouts")["items"] == []

    first = fleet.rollout("busy@1")
    again = {"version": "busy@1", "target": {"all": True}, "allow_unproven": True}
    refused = fleet.post("/rollouts", again, status=409)
    assert refused["code"] == "device_busy"
    assert "dev-1" in refused["detail"]
    second = fleet.rollout("busy@1", on_busy="supersede")
    assert [d["phase"] for d in fleet.deployments(first)] == ["superseded"]
    fleet.start_agent("dev-1")
    wait_until("the second rollout", lambda: fleet.rollout_state(second) == "succeeded")
