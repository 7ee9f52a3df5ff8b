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
from agent.serving import models
from agent.serving.bad_request import BadRequestError
from agent.serving.company import LONG_S, Company
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


def test_a_runtime_that_fails_while_it_is_closed_is_let_go_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Doubling):
        def close(self) -> None:
            raise OSError("device lost")

    model = LoadedModel(manifest(-1, 8), "d", Broken())
    model.close()
    assert model.closed
    assert "test 1 failed while it was closed: device lost" in caplog.text


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
    assert two.waited_s > 0.0 == three.waited_s


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


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, what takes 3 ms here is what may be inferred alone."""
    monkeypatch.setattr(models, "ALONE_S", 10.0)


async def until_idle(model: LoadedModel) -> None:
    """Until the model's thread has ended what it began: whoever is answered may ask before that."""
    while model.totals().oldest_s:  # noqa: ASYNC110 (nobody tells of that)
        await asyncio.sleep(0.001)


class Threads(Doubling):
    """One that notes which threads it runs in, and takes a while."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.threads: list[str] = []

    def run(self, inputs: Tensors) -> Tensors:
        self.threads.append(threading.current_thread().name)
        time.sleep(self.seconds)
        return super().run(inputs)


def test_what_is_short_is_inferred_where_it_was_read_once_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "AT_ONCE_S", 10.0)
    runtime = Threads()
    model = LoadedModel(manifest(-1, 8), "d", runtime)

    async def asks() -> list[float]:
        first = await ask(model)
        await until_idle(model)
        return [first, *await asyncio.gather(*(ask(model, value) for value in (2.0, 3.0, 4.0)))]

    assert asyncio.run(asks()) == [2.0, 4.0, 6.0, 8.0]
    model.close()
    here = threading.current_thread().name
    assert runtime.threads[0] != here
    assert runtime.threads[-1] == here
    assert sum(runtime.rows) == 4


def test_what_is_long_or_has_cores_of_its_own_is_left_to_its_thread() -> None:
    slow, pinned = Threads(0.015), Threads()
    for runtime, net in ((slow, manifest(-1, 1)), (pinned, scheduled(1, cores=(0,)))):
        model = LoadedModel(net, "d", runtime)

        async def asks(model: LoadedModel = model) -> None:
            for _ in range(3):
                await ask(model)

        asyncio.run(asks())
        model.close()
        assert threading.current_thread().name not in runtime.threads


@pytest.mark.usefixtures("patient")
def test_what_is_not_so_short_is_inferred_there_only_alone() -> None:
    runtime = Threads(0.003)
    model = LoadedModel(manifest(-1, 1), "d", runtime)
    here = threading.current_thread().name

    async def asks() -> None:
        await ask(model)
        await until_idle(model)
        await ask(model)
        assert runtime.threads[-1] == here
        runtime.threads.clear()
        await asyncio.gather(*(ask(model) for _ in range(3)))
        assert here not in runtime.threads

    asyncio.run(asks())
    model.close()


@pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.003])
def test_everyone_is_answered_whichever_thread_infers(seconds: float) -> None:
    runtime = Threads(seconds)
    model = LoadedModel(manifest(-1, 4), "d", runtime)

    async def asks(first: int) -> None:
        for value in range(first, first + 40):
            assert await ask(model, value) == 2.0 * value
            if value % 7 == first % 7:
                await asyncio.sleep(0.001)

    async def together() -> None:
        async with asyncio.timeout(30):
            await asyncio.gather(*(asks(number) for number in range(9)))

    asyncio.run(together())
    model.close()
    assert sum(runtime.rows) == 9 * 40


def test_the_next_is_answered_when_one_before_it_failed_where_it_was_read() -> None:
    class Failing(Threads):
        def run(self, inputs: Tensors) -> Tensors:
            if (inputs["x"] == 13.0).any():
                raise ValueError("unlucky")
            return super().run(inputs)

    model = LoadedModel(manifest(-1, 4), "d", Failing())

    async def asks() -> None:
        await ask(model)
        found = await asyncio.gather(*(ask(model, value) for value in (1.0, 13.0, 2.0)), return_exceptions=True)
        assert [found[0], found[2]] == [2.0, 4.0]
        assert isinstance(found[1], ValueError)
        assert await ask(model, 3.0) == 6.0

    asyncio.run(asks())
    model.close()


@pytest.mark.usefixtures("patient")
def test_while_another_model_is_asked_none_keeps_the_loop_waiting() -> None:
    one, other = Threads(0.003), Threads(0.003)
    loaded = [LoadedModel(manifest(-1, 1), "d", runtime) for runtime in (one, other)]
    loaded[1].company = loaded[0].company
    here = threading.current_thread().name

    async def asks() -> None:
        await ask(loaded[0])
        await until_idle(loaded[0])
        await ask(loaded[0])
        assert one.threads[-1] == here
        for _ in range(2):
            for model in reversed(loaded):
                await ask(model)
        assert here not in [*one.threads[2:], *other.threads]

    asyncio.run(asks())
    for model in loaded:
        model.close()


def test_company_is_over_when_only_one_was_asked_for_a_while() -> None:
    company = Company()
    assert company.is_alone("a", 0.0)
    assert not company.is_alone("b", 1.0)
    assert not company.is_alone("b", 1.0 + LONG_S / 2)
    assert company.is_alone("b", 1.0 + LONG_S)
    assert not company.is_alone("a", 1.1 + LONG_S)
