"""The gate on a device: candidates go there, are measured beside what it serves, and the best one there is picked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier

ACCURACY = {"budgets": {"accuracy_drop_points": 5}}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    fleet.start_server()
    fleet.start_agent("edge-1")
    fleet.post("/profiles", {"name": "edge", "runtime": "onnx", "precisions": ["fp32", "int8"], **ACCURACY})
    wait_until("the device", lambda: online(fleet, "edge-1"))
    yield fleet
    fleet.stop()


def online(fleet: LocalFleet, device: str) -> bool:
    return any(one["id"] == device and one["online"] and one["profile"] for one in fleet.get("/devices")["items"])


def pushed(fleet: LocalFleet, model: str, **options: Any) -> str:
    path = fleet.folder / f"{model}.onnx"
    write_classifier(path, **options)
    fleet.push(model, "1", path)
    return fleet.build(f"{model}@1", "edge")[0]["id"]


def ended(fleet: LocalFleet, run: str) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        found: dict[str, Any] = fleet.get(f"/gate-runs/{run}")
        return None if found["state"] == "running" else found

    return wait_until("the gate run", over, 120)


def asked(fleet: LocalFleet, reference: str, **fields: Any) -> str:
    return str(fleet.post("/gate-runs", {"version": reference, "profile": "edge", **fields})["id"])


def test_an_unproven_variant_is_proven_on_a_device_and_rolled_out(fleet: LocalFleet) -> None:
    variant = pushed(fleet, "proof", hidden=64)
    assert not fleet.get(f"/variants/{variant}")["proven"]
    refused = fleet.post("/rollouts", {"version": "proof@1", "target": {"all": True}}, status=409)
    assert refused["code"] == "variant_unproven"
    assert "shoal gate run proof@1 --profile edge" in refused["detail"]
    run = ended(fleet, asked(fleet, "proof@1"))
    assert run["state"] == "passed", run
    (trial,) = run["trials"]
    assert (trial["device_id"], trial["phase"]) == ("edge-1", "done")
    assert trial["results"][0]["recipe"] == "onnx-fp32"
    assert len(trial["results"]) == run["candidates"] >= 2
    for one in trial["results"]:
        assert one["provider"] == "cpu"
        assert one["samples"] == 200
        assert 0 < one["latency_p50_ms"] <= one["latency_p95_ms"] <= one["latency_p99_ms"]
        assert one["peak_memory_mb"] > 0
        assert one["load_s"] > 0
        assert one["accuracy"] > 0.9
        assert (one["against_reference"] is None) == (one["recipe"] == "onnx-fp32")
    assert trial["results"][0]["agreement"] == 1.0
    found = fleet.get(f"/variants/{variant}")
    assert found["proven"]
    assert found["gate"]["measured_on"] == "edge-1"
    assert {"against_fp32", "provider"} <= {check["name"] for check in found["gate"]["checks"]}
    assert found["measurements"]["measured_on"] == "edge-1"
    rollout = fleet.rollout("proof@1", allow_unproven=False)
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    rows = np.eye(8, dtype=np.float32)[:3]
    scores = np.array(fleet.infer("edge-1", "proof", rows)["outputs"][0]["data"]).reshape(3, 3)
    assert scores.argmax(1).tolist() == [0, 1, 2]
    again = ended(fleet, asked(fleet, "proof@1"))  # what devices run is judged, and not replaced
    assert again["candidates"] <= 2
    assert fleet.get(f"/variants/{variant}")["digest"] == found["digest"]


def test_who_can_not_measure_is_said(fleet: LocalFleet) -> None:
    spec = {"name": "tight", "runtime": "onnx", "match": {"tags.never": "x"}, "precisions": ["fp32"]}
    fleet.post("/profiles", {**spec, "budgets": {"memory_mb": 300}})
    path = fleet.folder / "tight.onnx"
    write_classifier(path)
    fleet.push("tight", "1", path)
    (built,) = fleet.build("tight@1", "tight")
    assert built["state"] == "ready"
    nobody = fleet.post("/gate-runs", {"version": "tight@1", "profile": "tight"}, status=409)
    assert nobody["code"] == "no_device_online"
    wrong = fleet.post("/gate-runs", {"version": "tight@1", "profile": "tight", "devices": ["edge-1"]}, status=409)
    assert wrong["code"] == "wrong_profile"


def test_a_killed_agent_measures_again_and_a_run_can_be_cancelled(fleet: LocalFleet) -> None:
    pushed(fleet, "again", hidden=1024)
    run = asked(fleet, "again@1")
    busy = fleet.post("/gate-runs", {"version": "again@1", "profile": "edge"}, status=409)
    assert busy["code"] == "gate_running"
    rebuild = {"version": "again@1", "profiles": ["edge"], "rebuild": True}
    assert fleet.post("/variants", rebuild, status=409)["code"] == "gate_running"
    kept = fleet.api.delete("/models/again/versions/1")
    assert (kept.status_code, kept.json()["code"]) == (409, "gate_running")
    wait_until("measuring", lambda: fleet.get(f"/gate-runs/{run}")["trials"][0]["phase"] == "measuring")
    fleet.kill("edge-1")
    fleet.start_agent("edge-1")
    assert ended(fleet, run)["state"] == "passed"
    wait_until("the device", lambda: online(fleet, "edge-1"))
    second = asked(fleet, "again@1")
    assert fleet.post(f"/gate-runs/{second}/cancel", status=200)["state"] == "cancelled"
    assert fleet.post(f"/gate-runs/{second}/cancel", status=409)["code"] == "gate_run_over"
    wait_until("no trial left", lambda: not leftovers(fleet.folder / "edge-1" / "trials"))
    trials = fleet.get(f"/gate-runs/{run}")["trials"]
    candidates = {one["digest"] for trial in trials for one in trial["results"]}
    assert len(candidates) > 1
    wait_until("files of trials to go", lambda: not candidates.intersection(names_in(fleet)) - set(served(fleet)))


def leftovers(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def names_in(fleet: LocalFleet) -> list[str]:
    return sorted(path.name for path in (fleet.folder / "edge-1" / "artifacts").iterdir())


def served(fleet: LocalFleet) -> list[str]:
    return sorted(one["digest"] for one in fleet.get("/devices/edge-1")["serving"])


@pytest.fixture(scope="module")
def unproven(fleet: LocalFleet) -> str:
    """A variant of `lost@1`, whose runs end without a word of a device."""
    return pushed(fleet, "lost", hidden=1024)


@pytest.mark.usefixtures("unproven")
def test_a_device_that_is_forgotten_is_not_waited_for(fleet: LocalFleet) -> None:
    fleet.start_agent("edge-2")
    wait_until("the device", lambda: online(fleet, "edge-2"))
    run = asked(fleet, "lost@1", devices=["edge-2"])
    begun = {"downloading", "measuring"}
    wait_until("its begin", lambda: fleet.get(f"/gate-runs/{run}")["trials"][0]["phase"] in begun)
    fleet.kill("edge-2")
    wait_until("the broker to notice", lambda: not online(fleet, "edge-2"))
    assert fleet.api.delete("/devices/edge-2").status_code == 204
    found = ended(fleet, run)
    assert found["state"] == "failed"
    assert "forgotten" in found["detail"]


def test_a_run_whose_time_is_over_fails_and_leaves_the_variant(fleet: LocalFleet, unproven: str) -> None:
    run = ended(fleet, asked(fleet, "lost@1", timeout_s=0.1))
    assert run["state"] == "failed"
    assert "had not finished" in run["detail"]
    found = fleet.get(f"/variants/{unproven}")
    assert (found["state"], found["proven"]) == ("ready", False)
