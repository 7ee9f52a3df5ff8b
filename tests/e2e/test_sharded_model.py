"""A model that is too big for one device: cut, rolled out in stages to real agents, and moved when a device is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
import pytest

from agent.client import Client
from tests.deep_net import write_deep
from tests.fleet import LocalFleet, wait_until

WIDTH, LAYERS = 256, 6
LAYER_MIB = WIDTH * WIDTH * 4 / 2**20
LENGTH = "Inference-Header-Content-Length"
DEVICES = ("edge-1", "edge-2", "edge-3")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    fleet.start_server()
    for name in DEVICES:
        # The first two reach each other; what goes to the third goes by the server.
        direct = '[inference]\naddress = "127.0.0.1:{port}"\n' if name != DEVICES[2] else ""
        fleet.start_agent(name, site="plant", tables=direct)
    # One precision: stages are measured as they were cut.
    fleet.post("/profiles", {"name": "edge", "runtime": "onnx", "precisions": ["fp32"]})
    wait_until("the devices", lambda: len(online(fleet)) == len(DEVICES))
    write_deep(fleet.folder / "deep.onnx", WIDTH, LAYERS)
    np.savez(fleet.folder / "rows.npz", x=np.random.default_rng(1).normal(size=(8, WIDTH)).astype(np.float32))
    fleet.post(
        "/models/deep/versions",
        {
            "name": "1",
            "sources": [{"format": "onnx", "digest": fleet.upload(fleet.folder / "deep.onnx")}],
            "evaluation": fleet.upload(fleet.folder / "rows.npz"),
        },
    )
    yield fleet
    fleet.stop()


def online(fleet: LocalFleet) -> set[str]:
    return {one["id"] for one in fleet.get("/devices")["items"] if one["online"] and one["profile"]}


def order(**fields: Any) -> dict[str, Any]:
    return {"version": "deep@1", "target": "site==plant", "memory_mb": LAYER_MIB * 3.5, **fields}


def through(fleet: LocalFleet, stages: list[dict[str, Any]], rows: np.ndarray) -> np.ndarray:
    """Rows through the devices of the stages, one after the other, by their local APIs."""
    arrays: dict[str, np.ndarray] = {"x": rows}
    for stage in stages:
        with Client(f"127.0.0.1:{fleet.agent_ports[stage['device']]}") as client:
            arrays = dict(client.infer(stage["model"], arrays))
    return arrays["y"]


def asked(fleet: LocalFleet, rows: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """The same by the server, which knows the way; and what it says of it."""
    blob = rows.tobytes()
    tensor = {"name": "x", "datatype": "FP32", "shape": rows.shape, "parameters": {"binary_data_size": len(blob)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    answer = fleet.api.post(
        "/models/deep/infer", content=head + blob, params={"timeout_s": 120},
        headers={LENGTH: str(len(head)), "Content-Type": "application/octet-stream"},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    length = int(answer.headers[LENGTH])
    said = json.loads(answer.content[:length])
    (output,) = said["outputs"]
    return np.frombuffer(answer.content[length:], np.float32).reshape(output["shape"]), said["parameters"]


def served(fleet: LocalFleet, plan: str) -> dict[str, Any] | None:
    found: dict[str, Any] = fleet.get(f"/shard-plans/{plan}")
    assert found["state"] != "failed", found
    return found if found["state"] == "active" else None


def test_a_dry_run_keeps_nothing(fleet: LocalFleet) -> None:
    found = fleet.post("/shard-plans", order(dry_run=True))
    assert (found["id"], found["state"], len(found["stages"])) == (None, "planned", 2)
    assert found["proof"]["exact"]
    assert found["proof"]["difference"] <= 1e-5
    assert fleet.get("/shard-plans")["items"] == []
    assert [one["name"] for one in fleet.get("/models")["items"]] == ["deep"]


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"memory_mb": LAYER_MIB / 2}, "no_plan", "memory"),
        ({"stages": 4}, "no_plan", "stages"),
        ({"target": "site==nowhere"}, "no_device", "devices"),
        ({"target": "sight==plant"}, "bad_query", "query"),
        ({"version": "deep"}, "invalid", "version"),
    ],
)
def test_bad_orders_name_the_field(fields: dict[str, Any], code: str, field: str, fleet: LocalFleet) -> None:
    found = fleet.post("/shard-plans", order(**fields), status=422)
    assert found["code"] == code, found
    assert [one["field"] for one in found["problems"]] == [field]
    assert fleet.get("/shard-plans")["items"] == []


def test_stages_serve_on_their_devices_and_move_when_one_is_lost(fleet: LocalFleet) -> None:
    plan = fleet.post("/shard-plans", order(lost_after_s=1))
    assert plan["state"] == "deploying"
    found = wait_until("the stages", lambda: served(fleet, plan["id"]), 120)
    assert [one["model"] for one in found["stages"]] == ["deep.stage-1-of-2", "deep.stage-2-of-2"]
    devices = [one["device"] for one in found["stages"]]
    assert len(set(devices)) == 2
    for one in found["stages"]:
        assert one["serves"]
        assert one["weight_bytes"] + one["activation_bytes"] <= one["memory_limit"] == int(LAYER_MIB * 3.5 * 2**20)
    rows = np.random.default_rng(2).normal(size=(5, WIDTH)).astype(np.float32)
    session = onnxruntime.InferenceSession(fleet.folder / "deep.onnx")
    whole = session.run(None, {"x": rows})[0]
    assert np.abs(through(fleet, found["stages"], rows) - whole).max() <= 1e-5
    many = np.random.default_rng(3).normal(size=(4_000, WIDTH)).astype(np.float32)
    expected = session.run(None, {"x": many})[0]
    answers, said = asked(fleet, many)
    assert np.abs(answers - expected).max() <= 1e-5
    assert [one["device"] for one in said["devices"]] == devices
    assert {one["rows"] for one in said["devices"]} == {len(many)}, "every row passed both"
    assert (devices, said["relayed"]) == ([*DEVICES[:2]], 0), "from device to device"

    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(asked, fleet, many)
        time.sleep(0.5)
        fleet.kill(devices[1])
        answers, _ = under_way.result()
    assert np.abs(answers - expected).max() <= 1e-5, "the rows that were left took another way"
    spare = next(iter(set(DEVICES) - set(devices)))

    def moved() -> dict[str, Any] | None:
        again = served(fleet, plan["id"])
        return again if again is not None and again["stages"][1]["device"] == spare else None

    again = wait_until("the stage on another device", moved, 120)
    assert again["stages"][0] == found["stages"][0]
    assert np.abs(through(fleet, again["stages"], rows) - whole).max() <= 1e-5

    answers, said = asked(fleet, rows)
    assert np.abs(answers - whole).max() <= 1e-5
    assert said["relayed"] > 0
    fleet.kill(spare)
    lost = wait_until("the end", lambda: failed(fleet, plan["id"]), 60)
    assert spare in lost["detail"]
    assert "0 spare devices" in lost["detail"]
    assert fleet.api.delete(f"/shard-plans/{plan['id']}").status_code == 204
    assert fleet.get("/shard-plans")["items"] == []


def failed(fleet: LocalFleet, plan: str) -> dict[str, Any] | None:
    found: dict[str, Any] = fleet.get(f"/shard-plans/{plan}")
    return found if found["state"] == "failed" else None
