"""Requests to a loaded model: batches, rows one by one, retirement."""

from __future__ import annotations

import asyncio
import threading
import time

import msgspec
import numpy as np
import pytest

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, Scheduling, TensorSpec
from agent.runtimes.base import Tensors
from agent.serving.bad_request import BadRequestError
from agent.serving.descriptions import metadata
from agent.serving.models import LoadedModel, RetiredError
from agent.serving.oip import decode_request
from agent.serving.waiting import DeadlineError, QueueFullError


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


def scheduled(max_batch: int, **values: float) -> Manifest:
    return msgspec.structs.replace(manifest(-1, max_batch), scheduling=Scheduling(**values))  # type: ignore[arg-type]


async def ask(model: LoadedModel, value: float = 1.0, **how: float) -> float:
    return float((await model.infer({"x": np.full((1, 2), value, np.float32)}, "", **how))["y"][0, 0])  # type: ignore[arg-type]


def test_more_than_may_wait_are_refused_and_told_when_to_come_again() -> None:
    runtime = Doubling()
    model = LoadedModel(scheduled(1, queue_limit=2), "d", runtime)

    async def flood() -> list[float | BaseException]:
        runtime.free.clear()
        first = asyncio.create_task(ask(model, 0))
        await asyncio.sleep(0.05)  # it runs; what comes now waits
        others = [asyncio.create_task(ask(model, value)) for value in (1, 2, 3)]
        urgent = asyncio.create_task(ask(model, 4, priority=1))
        await asyncio.sleep(0.05)
        runtime.free.set()
        return await asyncio.gather(first, *others, urgent, return_exceptions=True)

    first, one, two, three, urgent = asyncio.run(flood())
    model.close()
    assert [first, one, urgent] == [0.0, 2.0, 8.0]
    assert isinstance(three, QueueFullError)
    assert isinstance(two, QueueFullError), "it went for a more urgent one"
    assert three.retry_after_s > 0
    assert model.recorder.collect().rejected == 2


def test_a_request_waits_no_longer_than_its_client_would() -> None:
    runtime = Doubling()
    model = LoadedModel(scheduled(1), "d", runtime)

    async def late() -> float:
        runtime.free.clear()
        first = asyncio.create_task(ask(model, timeout_s=0.02))
        await asyncio.sleep(0.1)
        with pytest.raises(DeadlineError):
            await ask(model, timeout_s=0.02)
        assert not first.done(), "its turn has come: it is answered"
        runtime.free.set()
        return await first

    assert asyncio.run(late()) == 2.0
    model.close()
    assert runtime.rows == [1], "nobody waits for the other any more"
    window = model.recorder.collect()
    assert (window.requests, window.errors) == (2, 1)


def test_a_request_waits_for_company_where_that_is_asked_for() -> None:
    runtime = Doubling()
    model = LoadedModel(scheduled(4, batch_wait_ms=10_000), "d", runtime)

    async def some() -> list[float]:
        return list(await asyncio.gather(*(ask(model, value) for value in range(4))))

    assert asyncio.run(some()) == [0.0, 2.0, 4.0, 6.0]
    model.close()
    assert runtime.rows == [4], "a full batch waits no more"


def test_batches_stay_within_the_target_where_there_is_one() -> None:
    class Slow(Doubling):
        def run(self, inputs: Tensors) -> Tensors:
            time.sleep(0.01 * len(inputs["x"]))
            return super().run(inputs)

    runtime = Slow()
    model = LoadedModel(scheduled(16, latency_target_ms=50), "d", runtime)

    async def many() -> None:
        await ask(model)
        await asyncio.gather(*(ask(model) for _ in range(16)))

    asyncio.run(many())
    model.close()
    assert max(runtime.rows) <= 4, "of eight rows a batch takes 80 ms"
    assert sum(runtime.rows) == 17
