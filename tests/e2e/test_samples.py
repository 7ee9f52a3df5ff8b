"""Samples, end to end: real server, broker and agents, each killed while samples are kept and sent."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.samples.collecting import FOLDER, ORDERS
from agent.samples.sample import read_sample
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.models import SampleRequestRow
from fleet_server.settings import Settings
from tests.fleet import LocalFleet, wait_until, write_classifier

MODEL = "unsure"
ALLOW = "[samples]\nallow = true\n"
SPEC = {"samples": 5, "below": 0.6}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"), external_broker=True)
    fleet.start_broker()
    fleet.start_server()
    fleet.start_agent("open-1", tables=ALLOW)
    fleet.start_agent("shut-1")
    fleet.post("/profiles", {"name": "edge", "runtime": "onnx", "precisions": ["fp32"]})
    for device in ("open-1", "shut-1"):
        wait_until("the device", lambda device=device: profile_of(fleet, device))
    path = fleet.folder / "unsure.onnx"
    write_classifier(path)
    fleet.push(MODEL, "1", path)
    fleet.build(f"{MODEL}@1", "edge")
    rollout = fleet.rollout(f"{MODEL}@1")
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    yield fleet
    fleet.stop()


def profile_of(fleet: LocalFleet, device: str) -> str | None:
    found = {one["id"]: one for one in fleet.get("/devices")["items"]}
    return str(found[device]["profile"]) if device in found and found[device]["profile"] else None


def rows(*sizes: float) -> np.ndarray:
    return np.stack([np.eye(8, dtype=np.float32)[0] * size for size in sizes])


def kept(fleet: LocalFleet, device: str, model: str = "") -> list[float]:
    """How sure the answers were that a device keeps, of one model or of all."""
    folder = fleet.folder / device / FOLDER
    paths = folder.glob("*.sample") if folder.is_dir() else ()
    found = []
    for path in paths:
        try:
            sample = read_sample(path)
        except FileNotFoundError:
            continue  # another took its place
        if model in {"", sample.model}:
            found.append(sample.confidence)
    return sorted(found)


def turned_on(fleet: LocalFleet) -> None:
    answer = fleet.api.put(f"/models/{MODEL}/sampling-rules/edge", json=SPEC)
    assert answer.status_code == 200, answer.text


def request(fleet: LocalFleet, **fields: Any) -> str:
    return str(fleet.post("/sample-requests", {"model": MODEL, **fields})["id"])


def ended(fleet: LocalFleet, request_id: str) -> dict[str, dict[str, Any]]:
    def over() -> dict[str, Any] | None:
        found: dict[str, Any] = fleet.get(f"/sample-requests/{request_id}")
        return None if found["state"] == "running" else found

    found = wait_until("the request", over, 120)
    assert found["finished_at"]
    return {one["device_id"]: one for one in found["uploads"]}


def content(fleet: LocalFleet, set_id: str) -> dict[str, np.ndarray]:
    answer = fleet.api.get(f"/sample-sets/{set_id}/content")
    assert answer.status_code == 200, answer.text
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as found:
        return {name: found[name] for name in found.files if name != "samples.json"}


def filled(fleet: LocalFleet, *sizes: float) -> None:
    """Samples of these sizes are on the disk, at least as many as there may be."""
    unsure = sum(size < 1 for size in sizes)
    wanted = min(SPEC["samples"], len(kept(fleet, "open-1")) + unsure)
    deadline = time.monotonic() + 60
    wait_until("answers", lambda: answered(fleet, *sizes))
    while len(kept(fleet, "open-1")) < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_off_by_default_nothing_is_kept_and_a_request_says_why(fleet: LocalFleet) -> None:
    for device in ("open-1", "shut-1"):
        fleet.infer(device, MODEL, rows(0.1, 0.2, 0.3))
    answers = ended(fleet, request(fleet, devices=["open-1", "shut-1"]))
    assert {one["state"] for one in answers.values()} == {"failed"}
    assert {one["reason"] for one in answers.values()} == {"off"}
    assert "shoal sample keep" in answers["open-1"]["detail"]
    for device in ("open-1", "shut-1"):
        assert not (fleet.folder / device / FOLDER).exists()


def test_the_least_sure_are_kept_where_the_owner_allows_it_and_come_once_when_asked(fleet: LocalFleet) -> None:
    turned_on(fleet)
    nothing = ended(fleet, request(fleet, query="id==*-1"))
    assert (nothing["open-1"]["state"], nothing["open-1"]["reason"]) == ("empty", "none_kept")
    assert (nothing["shut-1"]["state"], nothing["shut-1"]["reason"]) == ("failed", "not_allowed")
    fleet.infer("shut-1", MODEL, rows(0.1, 0.2))
    filled(fleet, 9.0, 0.1, 8.0, 0.2, 9.0)
    assert all(one < 0.6 for one in kept(fleet, "open-1"))
    assert len(kept(fleet, "open-1")) == 2
    found = ended(fleet, request(fleet, devices=["open-1", "shut-1"]))
    assert found["shut-1"]["reason"] == "not_allowed"
    mine = found["open-1"]
    assert (mine["state"], mine["samples"]) == ("stored", 2)
    detail = fleet.get(f"/sample-sets/{mine['id']}")
    (variant,) = fleet.get("/variants", version=f"{MODEL}@1")["items"]
    assert {(one["version"], one["digest"]) for one in detail["listing"]} == {("1", variant["digest"])}
    confidences = [one["confidence"] for one in detail["listing"]]
    assert confidences == sorted(confidences)
    arrays = content(fleet, mine["id"])
    assert np.concatenate([arrays["0/in/x"], arrays["1/in/x"]]) == pytest.approx(rows(0.1, 0.2))
    assert arrays["0/out/scores"][0, 0] == pytest.approx(0.1, abs=1e-3)
    wait_until("what has come to go from the device", lambda: kept(fleet, "open-1") == [])
    assert not (fleet.folder / "shut-1" / FOLDER).exists()
    actions = [one["action"] for one in fleet.get("/audit-events", limit=100)["items"]]
    assert {"sampling.set", "samples.request", "samples.store", "samples.download"} <= set(actions)


def test_an_upload_comes_once_though_everything_is_killed(fleet: LocalFleet) -> None:
    wide(fleet, MANY)
    before = {one["id"] for one in fleet.get("/sample-sets")["items"]}
    allow(fleet, "1 MB per month")
    asked = request(fleet, model=WIDE, devices=["open-1"])
    victims = (
        ("open-1", lambda: fleet.start_agent("open-1")),
        ("server", lambda: start_server_again(fleet)),
        ("broker", fleet.start_broker),
        ("open-1", lambda: fleet.start_agent("open-1")),
    )
    known = 0
    for number, (name, start) in enumerate(victims, 1):
        # It must not be over before everything was killed: of its more than 4 MB so much may have gone, also in vain.
        allow(fleet, f"{number} MB per month")
        wait_until("more of it to come", lambda known=known: moved(fleet, asked) > known)
        fleet.kill(name)
        start()
        wait_until("the server", fleet.ready)
        known = moved(fleet, asked)
    (mine,) = fleet.get(f"/sample-requests/{asked}")["uploads"]
    assert mine["state"] == "sending", "it ought to have been on its way all the time"
    allow(fleet, None)
    found = ended(fleet, asked)["open-1"]
    assert (found["state"], found["samples"]) == ("stored", MANY)
    assert {one["id"] for one in fleet.get("/sample-sets")["items"]} - before == {found["id"]}
    arrays = content(fleet, found["id"])
    assert sorted(arrays[f"{number}/in/x"][0, 0] for number in range(MANY)) == pytest.approx(
        [number / 100 for number in range(MANY)]
    )
    wait_until("what has come to go", lambda: kept(fleet, "open-1") == [])


def start_server_again(fleet: LocalFleet) -> None:
    """Who ends requests would wait for most of a minute until the killed server's lease is over."""
    fleet.end_leases()
    fleet.start_server()


def allow(fleet: LocalFleet, budget: str | None) -> None:
    """So much may be sent and fetched, over links of any kind; None for all."""
    delivery = budget and {"budgets": dict.fromkeys(("ethernet", "wifi", "cellular"), budget)}
    assert fleet.api.patch("/profiles/edge", json={"delivery": delivery}).status_code == 200


WIDE = "wide"
MANY = 19
COLUMNS = 65_536


def wide(fleet: LocalFleet, count: int) -> None:
    """So many samples of 256 KiB each, of a model whose first three inputs are its scores."""
    if not any(one["name"] == WIDE for one in fleet.get("/models")["items"]):
        path = fleet.folder / "wide.onnx"
        write_wide(path)
        x = np.random.default_rng(1).standard_normal((20, COLUMNS)).astype(np.float32)
        np.savez(fleet.folder / "wide.npz", x=x, y=x[:, :3].argmax(1))
        version = {"name": "1", "sources": [{"format": "onnx", "digest": fleet.upload(path)}]}
        version["evaluation"] = fleet.upload(fleet.folder / "wide.npz")
        fleet.post(f"/models/{WIDE}/versions", version)
        (variant,) = fleet.build(f"{WIDE}@1", "edge")
        assert variant["state"] == "ready", variant
        rollout = fleet.rollout(f"{WIDE}@1")
        wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
        rule = {"samples": 20, "below": 0.6}
        assert fleet.api.put(f"/models/{WIDE}/sampling-rules/edge", json=rule).status_code == 200
        wait_until("the device to know", lambda: WIDE in (fleet.folder / "open-1" / ORDERS).read_text())
    rng = np.random.default_rng(0)

    def ask(number: int) -> None:
        row = rng.standard_normal((1, COLUMNS)).astype(np.float32)
        row[0, :3] = number / 100, 0, 0
        assert fleet.infer("open-1", WIDE, row)

    for _ in range(9):  # what is asked before the worker heard of the rule is not kept
        ask(0)
        with contextlib.suppress(AssertionError):
            wait_until("the first sample", lambda: kept(fleet, "open-1", WIDE), 10)
            break
    for number in range(1, count):
        ask(number)
    wait_until("the samples", lambda: len(kept(fleet, "open-1", WIDE)) >= count)


def write_wide(path: Path) -> None:
    bounds = [numpy_helper.from_array(np.array([one], np.int64), name) for one, name in ((0, "a"), (3, "b"), (1, "c"))]
    graph = helper.make_graph(
        [helper.make_node("Slice", ["x", "a", "b", "c"], ["scores"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", COLUMNS])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])],
        bounds,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))


def moved(fleet: LocalFleet, request_id: str) -> int:
    """How many bytes of it have come."""
    return sum(one["received"] for one in fleet.get(f"/sample-requests/{request_id}")["uploads"])


def test_a_killed_agent_leaves_whole_samples_alone(fleet: LocalFleet) -> None:
    for _ in range(3):
        wait_until("the model", lambda: answered(fleet, 0.1, 0.2, 0.3, 0.4))
        for _ in range(20):
            answered(fleet, 0.1, 0.2, 0.3, 0.4)
        fleet.kill("open-1")
        fleet.start_agent("open-1")
        wait_until("the model", lambda: answered(fleet, 0.1, 0.2, 0.3, 0.4))
        paths = list((fleet.folder / "open-1" / FOLDER).glob("*"))
        assert len(paths) <= SPEC["samples"]
        assert all(path.suffix == ".sample" and read_sample(path).confidence < 0.6 for path in paths)


def answered(fleet: LocalFleet, *sizes: float) -> bool:
    """Whether rows of these sizes were answered: a model may be being loaded."""
    asked = rows(*sizes)
    tensor = {"name": "x", "datatype": "FP32", "shape": list(asked.shape), "data": asked.flatten().tolist()}
    url = f"http://127.0.0.1:{fleet.agent_ports['open-1']}/v2/models/{MODEL}/infer"
    return httpx.post(url, json={"inputs": [tensor]}, timeout=30).status_code == 200


def test_an_upload_waits_for_its_budget_says_so_and_times_out(fleet: LocalFleet) -> None:
    wide(fleet, 6)
    allow(fleet, "1 MB per day")
    asked = request(fleet, model=WIDE, devices=["open-1"])

    def waits() -> bool:
        (one,) = fleet.get(f"/sample-requests/{asked}")["uploads"]
        return bool(one["waiting"]) and one["waiting"]["reason"] == "budget"

    wait_until("the budget", waits)
    assert 0 < moved(fleet, asked) <= 1_000_000
    end_time(fleet, asked)
    found = ended(fleet, asked)["open-1"]
    assert (found["state"], found["reason"]) == ("failed", "timeout")
    assert "1 MB per day" in found["detail"]
    assert len(kept(fleet, "open-1", WIDE)) == 6
    allow(fleet, None)
    assert ended(fleet, request(fleet, model=WIDE, devices=["open-1"]))["open-1"]["state"] == "stored"


def end_time(fleet: LocalFleet, request_id: str) -> None:
    """As if the time that a request had were over."""
    database = Database(Settings(state_dir=fleet.folder / "server").effective_database_url)
    with database.write() as session:
        session.get_one(SampleRequestRow, request_id).deadline_at = utc_now()
    database.dispose()


def test_samples_are_deleted_and_turned_off(fleet: LocalFleet) -> None:
    filled(fleet, 0.1, 0.2)
    sets = fleet.get("/sample-sets")["items"]
    stored = [fleet.folder / "server" / "artifacts" / "samples" / one["digest"][:2] / one["digest"] for one in sets]
    assert stored
    assert all(path.is_file() for path in stored)
    for one in sets:
        assert fleet.api.delete(f"/sample-sets/{one['id']}").status_code == 204
        assert fleet.api.get(f"/sample-sets/{one['id']}").status_code == 404
    assert not any(path.exists() for path in stored)
    assert fleet.get("/sample-sets")["items"] == []
    for model in (MODEL, WIDE):
        assert fleet.api.delete(f"/models/{model}/sampling-rules/edge").status_code == 204
    wait_until("nothing to be kept", lambda: not (fleet.folder / "open-1" / FOLDER).exists())
    fleet.infer("open-1", MODEL, rows(0.1))
    assert not (fleet.folder / "open-1" / ORDERS).exists()
