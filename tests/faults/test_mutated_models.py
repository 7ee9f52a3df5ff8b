"""Broken and hostile model files: each is refused or converted; the server lives, and nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.fleet import LocalFleet, wait_until, write_classifier

Mutation = Callable[[onnx.ModelProto, random.Random], bytes]


def truncated(model: onnx.ModelProto, rng: random.Random) -> bytes:
    content = model.SerializeToString()
    return content[: rng.randrange(len(content))]


def flipped(model: onnx.ModelProto, rng: random.Random) -> bytes:
    content = bytearray(model.SerializeToString())
    for _ in range(rng.randint(1, 12)):
        # The head holds the graph; further on there are only weights.
        content[rng.randrange(min(len(content), 600))] ^= 1 << rng.randrange(8)
    return bytes(content)


def huge_weight(model: onnx.ModelProto, rng: random.Random) -> bytes:
    model.graph.initializer[0].dims[0] = rng.choice([2**31, 2**40, 2**62, -5])
    return model.SerializeToString()


def huge_input(model: onnx.ModelProto, rng: random.Random) -> bytes:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = rng.choice([2**31, 2**50, -1])
    return model.SerializeToString()


def bomb(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """A small file that asks for many gigabytes when it runs."""
    size = numpy_helper.from_array(np.array([rng.choice([10**9, 10**11]), 64], np.int64), "bomb_shape")
    model.graph.initializer.append(size)
    model.graph.node.append(helper.make_node("ConstantOfShape", ["bomb_shape"], ["bomb"]))
    model.graph.node.append(helper.make_node("ReduceSum", ["bomb"], ["boom"], keepdims=0))
    model.graph.node.append(helper.make_node("Add", ["scores", "boom"], ["louder"]))
    model.graph.output[0].name = "louder"
    return model.SerializeToString()


def cycle(model: onnx.ModelProto, rng: random.Random) -> bytes:
    first = model.graph.node[0]
    first.input[0] = model.graph.node[rng.randrange(1, 3)].output[0]
    return model.SerializeToString()


def outside(model: onnx.ModelProto, rng: random.Random) -> bytes:
    tensor = model.graph.initializer[rng.randrange(3)]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", rng.choice(["../../../../etc/passwd", "/etc/passwd", "weights.bin"])
    return model.SerializeToString()


def stranger(model: onnx.ModelProto, rng: random.Random) -> bytes:
    model.graph.node[0].op_type = rng.choice(["Frobnicate", "", "If", "Loop"])
    if rng.random() < 0.5:
        model.graph.node[0].domain = "evil.example"
        model.opset_import.append(helper.make_opsetid("evil.example", 1))
    return model.SerializeToString()


def nested(model: onnx.ModelProto, rng: random.Random) -> bytes:
    graph = helper.make_graph([], "inner", [], [])
    for _ in range(rng.choice([5, 40])):
        node = helper.make_node("If", ["c"], ["o"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "outer", [], [])
        if graph.ByteSize() > 1 << 20:
            break
    model.graph.node.extend(graph.node)
    return model.SerializeToString()


def strings(model: onnx.ModelProto, rng: random.Random) -> bytes:
    model.graph.input[0].type.tensor_type.elem_type = rng.choice([TensorProto.STRING, TensorProto.COMPLEX64, 99])
    return model.SerializeToString()


MUTATIONS: tuple[Mutation, ...] = (
    truncated, flipped, flipped, huge_weight, huge_input, bomb, cycle, outside, stranger, nested, strings,
)  # fmt: skip


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server(SHOAL_CONVERSION_MEMORY_MB="2048", SHOAL_INSPECT_TIMEOUT_S="30")
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        yield fleet
    finally:
        fleet.stop()


def attack(fleet: LocalFleet, folder: Path, seeds: range) -> dict[str, int]:
    write_classifier(folder / "good.onnx")
    good = onnx.load(str(folder / "good.onnx"))
    counts = {"refused": 0, "accepted": 0}
    for seed in seeds:
        rng = random.Random(seed)
        model = onnx.ModelProto()
        model.CopyFrom(good)
        mutation = MUTATIONS[seed % len(MUTATIONS)]
        path = folder / "bad.onnx"
        path.write_bytes(mutation(model, rng) or b"\0")
        body = {"name": str(seed), "sources": [{"format": "onnx", "digest": fleet.upload(path)}]}
        answer = fleet.api.post("/models/bad/versions", json=body)
        assert answer.status_code in {201, 422}, f"{mutation.__name__} {seed}: {answer.status_code} {answer.text}"
        if answer.status_code == 422:
            counts["refused"] += 1
            problem = answer.json()
            assert problem["problems"][0]["field"].startswith("sources"), f"{mutation.__name__} {seed}: {problem}"
            assert len(problem["detail"]) < 2500
        else:
            counts["accepted"] += 1
            assert mutation in {flipped, stranger, nested, cycle}, f"{mutation.__name__} {seed} was accepted"
            assert fleet.build(f"bad@{seed}", "any")[0]["state"] in {"ready", "refused", "failed"}
            assert fleet.api.delete(f"/models/bad/versions/{seed}").status_code == 204
    return counts


def check_nothing_is_left(fleet: LocalFleet) -> None:
    server = fleet.folder / "server"
    assert httpx.get(f"{fleet.url}/readyz").status_code == 200

    def left() -> list[Path]:
        folders = [server / name for name in ("artifacts", "uploads", "conversions")]
        return [path for folder in folders for path in folder.rglob("*") if path.is_file()]

    wait_until("the last files to go", lambda: not left(), 10)
    children = psutil.Process(fleet.processes["server"].pid).children(recursive=True)
    assert [child.name() for child in children if child.name() != "mosquitto"] == []
    assert "Traceback" not in fleet.log("server")


def test_a_spread_of_mutations(fleet: LocalFleet, tmp_path: Path) -> None:
    counts = attack(fleet, tmp_path, range(len(MUTATIONS)))
    assert counts["refused"] >= 7
    check_nothing_is_left(fleet)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_mutations(fleet: LocalFleet, tmp_path: Path) -> None:
    counts = attack(fleet, tmp_path, range(1000, 1200))
    assert counts["refused"] >= 120
    check_nothing_is_left(fleet)
