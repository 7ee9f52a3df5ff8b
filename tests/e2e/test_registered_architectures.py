"""Weights alone, for a net whose code an operator installed: exported, trained and converted on the server."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.fleet import BIN, LocalFleet, write_classifier
from tests.small_net import NET, register, train, write_rows

BROKEN = """
def broken():
    raise RuntimeError("no such layer")
"""
ENTRY_POINTS = "tiny = net:build\ntinier = net:student\nbroken = net:broken\n"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    site = folder / "site"
    register(site, NET + BROKEN, ENTRY_POINTS)
    write_rows(folder / "t.npz", 500, 1)
    write_rows(folder / "e.npz", 200, 2)
    write_rows(folder / "c.npz", 64, 3, labels=False)
    write_rows(folder / "misnamed.npz", 64, 1, name="z")
    train(site, folder / "t.npz", folder / "w.safetensors")
    save_file({"0.weight": np.zeros((8, 3, 3, 3), np.float32)}, folder / "other.safetensors")
    found = LocalFleet(folder)
    try:
        found.start_server(PYTHONPATH=os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
        profile = {"name": "edge", "runtime": "onnx", "precisions": ["fp32", "int8"]}
        found.post("/profiles", {**profile, "budgets": {"accuracy_drop_points": 5}})
        yield found
    finally:
        found.stop()


def shoal(fleet: LocalFleet, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "shoal"), "--url", fleet.url, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=fleet.folder,
        env={**os.environ, "SHOAL_TOKEN": fleet.token, "COLUMNS": "80"},
    )


def body(fleet: LocalFleet, weights: str = "w.safetensors", **fields: Any) -> dict[str, Any]:
    digest = fleet.upload(fleet.folder / weights)
    sources = [{"format": "safetensors", "digest": digest}]
    evaluation = fleet.upload(fleet.folder / "e.npz")
    return {"name": "9", "sources": sources, "architecture": "tiny", "evaluation": evaluation, **fields}


def test_weights_become_a_version_that_is_trained_and_converted(fleet: LocalFleet) -> None:
    listed = shoal(fleet, "model", "architectures", "-o", "json")
    assert [one["name"] for one in json.loads(listed.stdout)] == ["broken", "tinier", "tiny"], listed.stderr
    data = ("--calibration", "c.npz", "--evaluation", "e.npz", "--training", "t.npz")
    push = ("model", "push", "net@1", "--architecture", "tiny", "--weights", "w.safetensors", *data, "-o", "json")
    pushed = shoal(fleet, *push)
    assert pushed.returncode == 0, pushed.stderr
    version = json.loads(pushed.stdout)
    forms = {one["format"]: one["exported"] for one in version["sources"]}
    assert forms["safetensors"] is False
    assert forms["onnx"] is True
    assert version["architecture"] == "tiny"
    assert version["inspection"]["training_samples"] == 500
    again = json.loads(shoal(fleet, *push).stdout)
    assert again["id"] == version["id"], "the same weights again are the same version"
    passes = ("--prune", "0.5", "--distill", "tinier", "--epochs", "1")
    built = shoal(fleet, "variant", "build", "net@1", "--profile", "edge", *passes, "-o", "json")
    assert built.returncode == 0, built.stderr + built.stdout
    (variant,) = json.loads(built.stdout)
    made = {one["recipe"]: one for one in variant["candidates"]}
    assert {"onnx-fp32", "pruned-0.5+onnx-fp32", "pruned-0.5+onnx-static-u8s8", "distilled+onnx-fp32"} <= set(made)
    pruned = made["pruned-0.5+onnx-fp32"]
    assert pruned["measurements"]["size"] < 0.7 * made["onnx-fp32"]["measurements"]["size"]
    lineage = [one["name"] for one in pruned["lineage"]["passes"]]
    assert lineage[0] == "prune"
    assert pruned["lineage"]["passes"][0]["parameters"]["work_wanted"] == 0.5
    assert variant["state"] == "ready"


def test_what_does_not_fit_is_refused_by_name_and_leaves_nothing(fleet: LocalFleet) -> None:
    def refused(code: str, **fields: Any) -> dict[str, Any]:
        found: dict[str, Any] = fleet.post("/models/bad/versions", body(fleet, **fields), status=422)
        assert found["code"] == code, found
        return found

    unknown = refused("unknown_architecture", architecture="resnet")
    assert "broken, tinier, tiny" in unknown["detail"]
    assert unknown["problems"][0]["field"] == "architecture"
    assert "no such layer" in refused("bad_architecture", architecture="broken")["detail"]
    assert "do not fit" in refused("bad_weights", weights="other.safetensors")["detail"]
    (fleet.folder / "code.safetensors").write_bytes(pickle.dumps({"w": [1]}))
    assert "not readable" in refused("bad_weights", weights="code.safetensors")["detail"]
    assert (
        "training: it has arrays ['z']"
        in refused("bad_data", training=fleet.upload(fleet.folder / "misnamed.npz"))["detail"]
    )
    assert "example rows" in refused("no_examples", evaluation=None)["detail"]
    for fields in ({"architecture": None}, {"sources": [], "architecture": "tiny"}):
        fleet.post("/models/bad/versions", {**body(fleet), **fields}, status=422)
    assert fleet.api.get("/models/bad").status_code == 404


def test_only_weights_with_rows_can_be_trained(fleet: LocalFleet) -> None:
    write_classifier(fleet.folder / "plain.onnx", hidden=16)
    sources = [{"format": "onnx", "digest": fleet.upload(fleet.folder / "plain.onnx")}]
    fleet.post("/models/plain/versions", {"name": "1", "sources": sources})
    wanted = {"version": "plain@1", "profiles": ["edge"], "training": {"prune": 0.5}}
    answer = fleet.post("/variants", wanted, status=422)
    assert answer["code"] == "not_trainable"
    assert "no weights of a registered architecture" in answer["detail"]
    assert "`shoal convert`" in answer["detail"]
