"""What is taken away goes wholly: superseded deployments, versions, devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server, two agents that serve m@1, and two further versions that are ready."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        for name in ("dev-a", "dev-b"):
            fleet.start_agent(name)
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the devices", lambda: len([d for d in fleet.get("/devices")["items"] if d["profile"]]) == 2)
        for version in ("1", "2", "3"):
            write_classifier(fleet.folder / f"{version}.onnx", seed=int(version))
            fleet.push("m", version, fleet.folder / f"{version}.onnx")
            assert fleet.build(f"m@{version}", "any")[0]["state"] == "ready"
        first = fleet.rollout("m@1")
        wait_until("m@1", lambda: fleet.rollout_state(first) == "succeeded")
        yield fleet
    finally:
        fleet.stop()


def serving(fleet: LocalFleet, device: str) -> list[str]:
    shown: dict[str, Any] = fleet.get(f"/devices/{device}")
    return [one["version"] for one in shown["serving"]] if shown["online"] else []


def delete(fleet: LocalFleet, path: str, status: int) -> httpx.Response:
    answer = fleet.api.delete(path)
    assert answer.status_code == status, answer.text
    return answer


def test_a_superseded_device_goes_back_until_its_stage_comes(fleet: LocalFleet) -> None:
    fleet.kill("dev-b")
    second = fleet.rollout("m@2")
    wait_until("m@2 on dev-a", lambda: serving(fleet, "dev-a") == ["2"])
    fleet.api.patch("/devices/dev-a", json={"tags": {"ring": "canary"}}).raise_for_status()
    stages: dict[str, Any] = {"stages": [{"percent": 50, "soak_s": 3600}, {"percent": 100}]}
    stages["order"] = {"tag": "ring", "first": ["canary"]}
    third = fleet.rollout("m@3", strategy=stages, on_busy="supersede")
    fleet.start_agent("dev-b")
    wait_until("m@3 on dev-a", lambda: serving(fleet, "dev-a") == ["3"])

    def back() -> list[dict[str, Any]]:
        rows = [row for row in fleet.deployments(second) if row["device_id"] == "dev-b"]
        return [row for row in rows if row["desired"] and row["version"] == "1" and row["phase"] == "active"]

    wait_until("dev-b back on m@1", back)
    assert serving(fleet, "dev-b") == ["1"]
    assert [row["phase"] for row in fleet.deployments(third) if row["device_id"] == "dev-b"] == ["scheduled"]
    fleet.post(f"/rollouts/{third}/abort", {}, status=200)


def test_a_version_that_was_never_rolled_out_goes_with_its_files(fleet: LocalFleet, tmp_path: Path) -> None:
    store = fleet.folder / "server" / "artifacts"
    before = {path for path in store.rglob("*") if path.is_file()}
    write_classifier(tmp_path / "model.onnx", seed=9)
    fleet.push("short-lived", "1", tmp_path / "model.onnx")
    assert fleet.build("short-lived@1", "any")[0]["state"] == "ready"
    assert {path for path in store.rglob("*") if path.is_file()} > before
    delete(fleet, "/models/short-lived/versions/1", 204)
    assert {path for path in store.rglob("*") if path.is_file()} == before
    assert "short-lived" not in [model["name"] for model in fleet.get("/models")["items"]]
    assert delete(fleet, "/models/short-lived/versions/1", 404).json()["code"] == "model_not_found"


def test_a_version_that_was_rolled_out_stays(fleet: LocalFleet) -> None:
    assert delete(fleet, "/models/m/versions/1", 409).json()["code"] == "version_in_use"
    assert fleet.get("/models/m/versions/1")["name"] == "1"


def test_a_version_whose_variant_is_being_built_can_be_deleted(fleet: LocalFleet, tmp_path: Path) -> None:
    write_classifier(tmp_path / "model.onnx", seed=10)
    fleet.push("in-work", "1", tmp_path / "model.onnx")
    fleet.post("/variants", {"version": "in-work@1", "profiles": ["any"]}, status=202)
    wait_until("its building", lambda: fleet.get("/variants", version="in-work@1")["items"][0]["state"] != "queued")
    delete(fleet, "/models/in-work/versions/1", 204)
    write_classifier(tmp_path / "model.onnx", seed=11)
    fleet.push("after", "1", tmp_path / "model.onnx")
    assert fleet.build("after@1", "any")[0]["state"] == "ready"
    assert "failed; it goes on" not in fleet.log("server")


def test_a_forgotten_device_is_waited_for_no_more_and_comes_back(fleet: LocalFleet) -> None:
    assert delete(fleet, "/devices/dev-b", 409).json()["code"] == "device_online"
    fleet.kill("dev-b")
    wait_until("dev-b offline", lambda: not fleet.get("/devices/dev-b")["online"])
    rollout = fleet.rollout("m@3", on_busy="supersede")
    delete(fleet, "/devices/dev-b", 204)
    wait_until("the rollout, without it", lambda: fleet.rollout_state(rollout) == "succeeded")
    assert [device["id"] for device in fleet.get("/devices")["items"]] == ["dev-a"]
    delete(fleet, "/devices/dev-b", 404)
    fleet.start_agent("dev-b")
    wait_until("dev-b back", lambda: len(fleet.get("/devices")["items"]) == 2)
    wait_until("its model gone", lambda: fleet.get("/devices/dev-b")["serving"] == [])
