"""Models that take or answer texts, end to end: uploaded, built, proven on a device, rolled out, and asked there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.fleet import LocalFleet, wait_until

ML = "ai.onnx.ml"
NAMES = ["cat", "dog", "emu"]
ROWS = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 0, 2, 2, 1]]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    fleet.start_server()
    fleet.start_agent("edge-1")
    fleet.post("/profiles", {"name": "edge", "runtime": "onnx", "budgets": {"accuracy_drop_points": 5}})
    wait_until("the device", lambda: any(one["profile"] for one in fleet.get("/devices")["items"]))
    yield fleet
    fleet.stop()


def saved(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any]) -> Path:
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(ML, 3)])
    model.ir_version = 9
    onnx.save(model, str(path))
    return path


def text_to_scores(path: Path) -> Path:
    """The words of three animals, however they are written, to scores of three classes."""
    table = np.eye(4, 3, dtype=np.float32) * 4
    return saved(
        path,
        [
            helper.make_node("StringNormalizer", ["text"], ["lower"], case_change_action="LOWER", locale="C"),
            helper.make_node(
                "LabelEncoder", ["lower"], ["index"], domain=ML, keys_strings=NAMES, values_int64s=[0, 1, 2],
                default_int64=3,
            ),
            helper.make_node("Gather", ["table", "index"], ["scores"]),
        ],
        [helper.make_tensor_value_info("text", TensorProto.STRING, ["batch"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(table, "table")],
    )  # fmt: skip


def classifier(path: Path, *, names: bool) -> Path:
    """As classifiers of scikit-learn are exported without ZipMap: the label first, then probabilities."""
    weights = np.eye(3, dtype=np.float32) * 4
    label = helper.make_tensor_value_info("label", TensorProto.STRING if names else TensorProto.INT64, ["batch"])
    last = (
        helper.make_node("LabelEncoder", ["i"], ["label"], domain=ML, keys_int64s=[0, 1, 2], values_strings=NAMES)
        if names
        else helper.make_node("Identity", ["i"], ["label"])
    )
    return saved(
        path,
        [
            helper.make_node("MatMul", ["x", "w"], ["s"]),
            helper.make_node("Softmax", ["s"], ["probabilities"], axis=1),
            helper.make_node("ArgMax", ["s"], ["i"], axis=1, keepdims=0),
            last,
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [label, helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weights, "w")],
    )


def rolled_out(fleet: LocalFleet, model: str, path: Path, **arrays: np.ndarray) -> dict[str, Any]:
    """Pushed, built, proven on the device, and served there; what its variant was measured as."""
    np.savez(fleet.folder / f"{model}.npz", **arrays)
    version = {
        "name": "1",
        "sources": [{"format": "onnx", "digest": fleet.upload(path)}],
        "evaluation": fleet.upload(fleet.folder / f"{model}.npz"),
    }
    fleet.post(f"/models/{model}/versions", version)
    (variant,) = fleet.build(f"{model}@1", "edge")
    assert variant["state"] == "ready", variant
    run = fleet.post("/gate-runs", {"version": f"{model}@1", "profile": "edge"})["id"]

    def over() -> dict[str, Any] | None:
        found: dict[str, Any] = fleet.get(f"/gate-runs/{run}")
        return None if found["state"] == "running" else found

    proof = wait_until("the gate run", over, 120)
    assert proof["state"] == "passed", proof
    rollout = fleet.rollout(f"{model}@1", allow_unproven=False)
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    found: dict[str, Any] = fleet.get(f"/variants/{variant['id']}")
    assert found["proven"]
    assert list((fleet.folder / "edge-1" / "artifacts").iterdir())
    return found


def outputs(fleet: LocalFleet, model: str, tensor: dict[str, Any]) -> dict[str, Any]:
    url = f"http://127.0.0.1:{fleet.agent_ports['edge-1']}/v2/models/{model}/infer"
    answer = httpx.post(url, json={"inputs": [tensor]}, timeout=30)
    assert answer.status_code == 200, answer.text
    return {one["name"]: one for one in answer.json()["outputs"]}


def test_texts_in_scores_out(fleet: LocalFleet) -> None:
    words = np.array(["cat", "DOG", "emu", "dog", "Cat", "Emu", "EMU", "dog"])
    path = text_to_scores(fleet.folder / "reader.onnx")
    variant = rolled_out(fleet, "reader", path, text=words, y=ROWS.argmax(1))
    assert variant["measurements"]["accuracy"] == 1.0
    version = fleet.get("/models/reader/versions/1")
    assert [(one["name"], one["dtype"]) for one in version["inputs"]] == [("text", "string")]
    got = outputs(fleet, "reader", {"name": "text", "datatype": "BYTES", "shape": [3], "data": ["Emu", "cat", "yak"]})
    assert np.array(got["scores"]["data"]).reshape(3, 3).tolist() == [[0, 0, 4], [4, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("names", [True, False], ids=["texts", "numbers"])
def test_a_label_comes_first_and_probabilities_after_it(fleet: LocalFleet, names: bool) -> None:
    model = "named" if names else "numbered"
    path = classifier(fleet.folder / f"{model}.onnx", names=names)
    variant = rolled_out(fleet, model, path, x=ROWS, y=ROWS.argmax(1))
    assert variant["measurements"]["accuracy"] == 1.0
    asked = {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": ROWS[1:3].flatten().tolist()}
    got = outputs(fleet, model, asked)
    assert got["label"]["datatype"] == ("BYTES" if names else "INT64")
    assert got["label"]["data"] == (["dog", "emu"] if names else [1, 2])
    assert np.array(got["probabilities"]["data"]).reshape(2, 3).argmax(1).tolist() == [1, 2]
    windows = wait_until("telemetry", lambda: fleet.get("/telemetry/models", model=model)["items"])
    assert windows[0]["version"] == "1"


def test_without_rows_texts_are_made_up(fleet: LocalFleet) -> None:
    path = text_to_scores(fleet.folder / "made-up.onnx")
    fleet.post("/models/made-up/versions", {"name": "1", "sources": [{"format": "onnx", "digest": fleet.upload(path)}]})
    assert fleet.get("/models/made-up/versions/1")["inputs"][0]["dtype"] == "string"


def test_labels_for_a_model_of_texts_alone_are_refused(fleet: LocalFleet) -> None:
    path = saved(
        fleet.folder / "lower.onnx",
        [helper.make_node("StringNormalizer", ["text"], ["lower"], case_change_action="LOWER", locale="C")],
        [helper.make_tensor_value_info("text", TensorProto.STRING, ["batch"])],
        [helper.make_tensor_value_info("lower", TensorProto.STRING, ["batch"])],
        [],
    )
    np.savez(fleet.folder / "lower.npz", text=np.array(["A", "b"]), y=np.array([0, 1]))
    version = {
        "name": "1",
        "sources": [{"format": "onnx", "digest": fleet.upload(path)}],
        "evaluation": fleet.upload(fleet.folder / "lower.npz"),
    }
    refused = fleet.post("/models/lower/versions", version, status=422)
    assert refused["code"] == "bad_data"
    assert "leave `y` out" in refused["detail"]
    np.savez(fleet.folder / "lower.npz", text=np.array(["A", "b"]))
    version["sources"] = [{"format": "onnx", "digest": fleet.upload(path)}]  # what was refused is gone
    version["evaluation"] = fleet.upload(fleet.folder / "lower.npz")
    fleet.post("/models/lower/versions", version)
    (variant,) = fleet.build("lower@1", "edge")
    assert variant["state"] == "ready", variant
