"""Requests to a loaded model: batches, rows one by one, retirement."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.runtimes.base import Tensors
from agent.serving.models import LoadedModel, RetiredError
from agent.serving.oip import BadRequestError, decode_request, metadata


class Doubling:
    """A runtime that doubles what it gets, and notes how many rows came at once; it can be held."""

    version, provider = "test 1", "cpu"

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.free = threading.Event()
        self.free.set()

    def run(self, inputs: Tensors) -> Tensors:
        self.free.wait(10)
        self.rows.append(len(inputs["x"]))
        return {"y": inputs["x"] * 2}

    def close(self) -> None:
        pass


def manifest(rows: int, max_batch: int) -> Manifest:
    return Manifest(
        digest="0" * 64,
        size=1,
        chunk_size=1,
        model="m",
        version="1",
        variant_id="v",
        profile="p",
        format=ModelFormat.ONNX,
        runtime=RuntimeName.ONNX,
        precision=Precision.FP32,
        inputs=(TensorSpec("x", "float32", (rows, 2)),),
        outputs=(TensorSpec("y", "float32", (rows, 2)),),
        max_batch=max_batch,
    )


def body(rows: int) -> bytes:
    data = ", ".join(["1.0"] * rows * 2)
    return (f'{{"inputs": [{{"name": "x", "datatype": "FP32", "shape": [{rows}, 2], "data": [{data}]}}]}}').encode()


def test_a_file_of_one_row_takes_any_number_of_them() -> None:
    runtime, fixed = Doubling(), manifest(1, 1)
    model = LoadedModel(fixed, "d", runtime)
    request = decode_request(body(3), None, fixed)
    answer = asyncio.run(model.infer(request.inputs, ""))
    model.close()
    assert answer["y"].tolist() == [[2.0, 2.0]] * 3
    assert runtime.rows == [1, 1, 1]
    assert metadata(fixed)["inputs"][0]["shape"] == [-1, 2]


def test_rows_that_a_model_fixes_otherwise_are_its_own_matter() -> None:
    with pytest.raises(BadRequestError, match=r"shape \[3, 2\].*\[4, 2\]"):
        decode_request(body(3), None, manifest(4, 1))


def test_what_waits_becomes_one_batch_and_a_lone_request_never_waits() -> None:
    runtime = Doubling()
    model = LoadedModel(manifest(-1, 8), "d", runtime)

    async def ask(value: float) -> float:
        return float((await model.infer({"x": np.full((1, 2), value, np.float32)}, ""))["y"][0, 0])

    async def many() -> list[float]:
        runtime.free.clear()
        asked = [asyncio.create_task(ask(float(i))) for i in range(6)]
        await asyncio.sleep(0.05)
        runtime.free.set()
        return list(await asyncio.gather(*asked))

    assert asyncio.run(many()) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    model.close()
    assert sum(runtime.rows) == 6
    assert len(runtime.rows) <= 3


def test_a_retired_artifact_says_so_instead_of_never_answering() -> None:
    model = LoadedModel(manifest(-1, 8), "d", Doubling())
    model.close()
    with pytest.raises(RetiredError):
        asyncio.run(model.infer({"x": np.zeros((1, 2), np.float32)}, ""))
