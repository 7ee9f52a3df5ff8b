"""Weights of a registered architecture become a program of torch, which a device serves beside one that runs ONNX."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier
from tests.small_net import NET, register, train, write_rows

ROWS = np.random.default_rng(5).standard_normal((5, 3, 12, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    site = folder / "site"
    register(site, NET, "tiny = net:build\n")
    write_rows(folder / "t.npz", 400, 1)
    write_rows(folder / "e.npz", 200, 2)
    train(site, folder / "t.npz", folder / "w.safetensors")
    found = LocalFleet(folder)
    try:
        found.start_server(PYTHONPATH=os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
        for runtime in ("torch", "onnx"):
            found.start_agent(f"runs-{runtime}", kind=runtime)
            match = {"tags.kind": runtime, f"runtimes.{runtime}.providers": "cpu"}
            profile = {"name": runtime, "match": match, "runtime": runtime, "precisions": ["fp32"]}
            found.post("/profiles", {**profile, "budgets": {"accuracy_drop_points": 1}})
        yield found
    finally:
        found.stop()


@pytest.mark.timeout(900)  # it builds three variants, and a machine that runs tests may be busy
def test_a_program_is_made_of_weights_and_answers_as_the_onnx_variant_does(fleet: LocalFleet) -> None:
    wait_until("the devices", lambda: [one["profile"] for one in fleet.get("/devices")["items"]].count(None) == 0)
    body: dict[str, Any] = {
        "name": "1",
        "sources": [{"format": "safetensors", "digest": fleet.upload(fleet.folder / "w.safetensors")}],
        "architecture": "tiny",
        "evaluation": fleet.upload(fleet.folder / "e.npz"),
        "training": fleet.upload(fleet.folder / "t.npz"),
    }
    version = fleet.post("/models/net/versions", body)
    assert "pt2" not in {one["format"] for one in version["sources"]}, "it is made where a profile wants it"
    wanted = {"version": "net@1", "profiles": ["torch"], "training": {"prune": 0.5, "epochs": 1}}
    ids = [one["id"] for one in fleet.post("/variants", wanted, status=202)]
    variant = wait_until("the variant", lambda: _built(fleet, ids[0]), 240)
    assert variant["state"] == "ready", variant
    made = {one["recipe"]: one for one in variant["candidates"]}
    assert set(made) == {"torch-fp32", "pruned-0.5+torch-fp32"}
    plain = made["torch-fp32"]
    assert plain["error"] is None
    assert plain["measurements"]["agreement"] == 1.0
    assert plain["lineage"]["source_format"] == "safetensors"
    assert plain["lineage"]["source_digest"] == body["sources"][0]["digest"]
    assert [one["name"] for one in plain["lineage"]["passes"]] == ["torch-export", "keep"]
    assert plain["lineage"]["tools"]["torch"].startswith("2.13.")
    assert plain["golden"] is not None
    smaller = made["pruned-0.5+torch-fp32"]["measurements"]["size"]
    assert smaller < 0.8 * plain["measurements"]["size"]

    fleet.post("/models/net/versions", {**body, "name": "2"})
    assert [one["state"] for one in fleet.build("net@2", "torch", "onnx")] == ["ready", "ready"]
    gate = fleet.post("/gate-runs", {"version": "net@2", "profile": "torch"})["id"]
    wait_until("the gate run", lambda: fleet.get(f"/gate-runs/{gate}")["state"] == "passed", 120)
    rollout = fleet.rollout("net@2")
    wait_until("net@2", lambda: fleet.rollout_state(rollout) == "succeeded")
    (served,) = fleet.get("/devices/runs-torch")["serving"]
    assert (served["runtime"].split("+")[0], served["provider"], served["fell_back"]) == ("torch 2.13.0", "cpu", "")
    for rows in (ROWS[:1], ROWS):
        mine, other = (_scores(fleet, agent, rows) for agent in ("runs-torch", "runs-onnx"))
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4)


def _built(fleet: LocalFleet, variant: str) -> dict[str, Any] | None:
    found: dict[str, Any] = fleet.get(f"/variants/{variant}")
    return None if found["state"] in {"queued", "building"} else found


def _scores(fleet: LocalFleet, agent: str, rows: np.ndarray) -> np.ndarray:
    (output,) = fleet.infer(agent, "net", rows)["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def test_what_is_no_weights_is_told_what_to_push(fleet: LocalFleet) -> None:
    write_classifier(fleet.folder / "plain.onnx")
    fleet.push("plain", "1", fleet.folder / "plain.onnx")
    (variant,) = fleet.build("plain@1", "torch")
    (candidate,) = variant["candidates"]
    assert "push the version as safetensors of a registered architecture" in candidate["error"]
    digest = fleet.upload(fleet.folder / "plain.onnx")
    refused = {"name": "2", "sources": [{"format": "pt2", "digest": digest}]}
    assert "sources" in str(fleet.post("/models/plain/versions", refused, status=422))
    unusable = {"name": "int8", "runtime": "torch", "precisions": ["int8"]}
    assert "add fp32" in str(fleet.post("/profiles", unusable, status=422))
