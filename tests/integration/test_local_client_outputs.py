"""The client's outputs in shared memory, its feedback, and calls that are given up, beside a real worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.client import AsyncClient, BadRequestError, Client, TimedOutError
from agent.client.connection import Connection, Link
from agent.client.sizes import MISFITS_MOST, SHARED_FROM
from agent.protocol.manifest import Manifest, TensorSpec
from agent.serving.ipc import Collect, Expect, Unload, Window
from tests.fleet import wait_until, write_classifier
from tests.integration.test_local_client import objects, regions
from tests.serving_worker import ServingWorker, described, serve, start_worker, write, write_echo
from tests.traps import write_trapped

LARGE = np.arange(SHARED_FROM, dtype=np.float32).reshape(4, -1)
SPECS = (TensorSpec("x", "float32", (-1, 8)),), (TensorSpec("scores", "float32", (-1, 3)),)
ROW = np.array([[0.1, 0.9, 0.2, 0, 0, 0, 0, 0]], np.float32)
ARMED = np.array([[5, 0, 0, 0, 0, 0, 0, 60]], np.float32)
NODES = {
    "y": helper.make_node("Identity", ["x"], ["y"]),
    "z": helper.make_node("Neg", ["x"], ["z"]),
    "twice": helper.make_node("Concat", ["x", "x"], ["y"], axis=1),
}


def write_version(path: Path, number: int, *nodes: str) -> Manifest:
    """A version of the model `m`."""
    names = ["y" if one == "twice" else one for one in nodes]
    value = helper.make_tensor_value_info
    outputs = [value(name, TensorProto.FLOAT, ["rows", f"width_{name}"]) for name in names]
    made: list[onnx.NodeProto] = [NODES[one] for one in nodes]
    write(path, made, [value("x", TensorProto.FLOAT, ["rows", "width"])], list(outputs))
    specs = tuple(TensorSpec(name, "float32", (-1, -1)) for name in names)
    x = (TensorSpec("x", "float32", (-1, -1)),)
    return described("m", x, specs, version=str(number), digest=f"{number:x}" * 64)


@pytest.fixture
def place(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/api.sock"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[ServingWorker]:
    """One with an echo and a classifier. It must end well."""
    started = start_worker(str(tmp_path / "api.sock"))
    serve(started.channel, write_echo(tmp_path / "echo", "float32"), tmp_path / "echo")
    write_classifier(tmp_path / "classes")
    serve(started.channel, described("classes", *SPECS), tmp_path / "classes")
    try:
        yield started
    finally:
        started.channel.close()
        assert started.process.wait(20) == 0
        assert objects() == []


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each reply of an inference had, as they come."""
    found: list[int] = []
    real = Link.ask

    async def ask(self: Link, ask: Any, until: float | None) -> Any:
        reply = await real(self, ask, until)
        if ask.path.endswith("/infer"):
            found.append(len(reply.body))
        return reply

    monkeypatch.setattr(Link, "ask", ask)
    return found


def test_large_outputs_come_by_shared_memory_and_are_the_callers_own(
    worker: ServingWorker, place: str, bodies: list[int]
) -> None:
    with Client(place) as client:
        answers = [client.infer("echo-float32", {"x": LARGE + number})["y"] for number in range(6)]
        assert bodies[0] > LARGE.nbytes
        assert max(bodies[1:]) < 1000
        for number, answer in enumerate(answers):
            assert np.array_equal(answer, LARGE + number)
            assert answer.flags.writeable
        answers[3][:] = 0
        assert np.array_equal(client.infer("echo-float32", {"x": LARGE})["y"], LARGE)
        assert np.array_equal(answers[2], LARGE + 2)
        assert len(regions(place)) == 1
        other = client.infer("echo-float32", {"x": LARGE.reshape(8, -1)}, outputs=["y"], request_id="r")
        assert (other["y"].shape, other.request_id, other.version) == ((8, SHARED_FROM // 8), "r", "1")
    assert regions(place) == []


def test_outputs_of_few_bytes_in_one_answer_with_large_ones(worker: ServingWorker, place: str, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["y"]),
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=1, axes=[1]),
    ]
    value = helper.make_tensor_value_info
    outputs = [value("y", TensorProto.FLOAT, ["rows", "w"]), value("top", TensorProto.FLOAT, ["rows", 1])]
    write(tmp_path / "m", nodes, [value("x", TensorProto.FLOAT, ["rows", "w"])], list(outputs))
    specs = TensorSpec("y", "float32", (-1, -1)), TensorSpec("top", "float32", (-1, 1))
    serve(worker.channel, described("m", (TensorSpec("x", "float32", (-1, -1)),), specs), tmp_path / "m")
    with Client(place) as client:
        for number in range(3):
            answer = client.infer("m", {"x": LARGE + number})
            assert np.array_equal(answer["y"], LARGE + number)
            assert np.array_equal(answer["top"], (LARGE + number).max(axis=1, keepdims=True))
            assert answer["top"].flags.aligned


def test_versions_with_other_outputs_are_answered_whole(worker: ServingWorker, place: str, tmp_path: Path) -> None:
    """More outputs, larger ones, fewer, others: as often as it takes to be expected."""
    versions = [("y",), ("y", "z"), ("twice",), ("z",), ("y",)]
    with Client(place) as client:
        last = None
        for number, nodes in enumerate(versions, 1):
            manifest = write_version(tmp_path / f"{number}", number, *nodes)
            serve(worker.channel, manifest, tmp_path / f"{number}")
            if last is not None:
                worker.channel.send(Unload("m", last.digest))
            last = manifest
            for _ in range(3):
                answer = client.infer("m", {"x": LARGE})
                assert answer.version == str(number)
                expected = {"y": LARGE, "z": -LARGE, "twice": np.concatenate([LARGE, LARGE], axis=1)}
                assert list(answer) == ["y" if one == "twice" else one for one in nodes]
                for one in nodes:
                    assert np.array_equal(answer["y" if one == "twice" else one], expected[one])
    assert len(versions) > MISFITS_MOST


def write_wide(path: Path, rounds: int) -> None:
    """A classifier whose scores are repeated until they are large, and that is slow with rows that spring its trap."""
    write_trapped(path, "slow", rounds=rounds)
    model = onnx.load(str(path))
    model.graph.node[-1].output[0] = "narrow"
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 30_000], np.int64), "widths"))
    model.graph.node.append(helper.make_node("Tile", ["narrow", "widths"], ["scores"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["rows", 90_000]))
    onnx.save(model, str(path))


@pytest.mark.parametrize("given_up", ["by its time", "by its task"])
def test_a_call_that_was_given_up_writes_into_no_other(
    worker: ServingWorker, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_up: str
) -> None:
    """The worker ends it while the next answer of the same connection lies in shared memory, and is not read yet."""
    for name, rounds in (("quick", 1), ("slow", 500_000)):
        write_wide(tmp_path / name, rounds)
        manifest = described(name, SPECS[0], (TensorSpec("scores", "float32", (-1, 90_000)),))
        serve(worker.channel, manifest, tmp_path / name)
    real, armed = Link.ask, False

    def ended() -> bool:
        connection = Connection("", place.removeprefix("unix:"))
        said = json.loads(connection.ask("GET", "/v2/models/slow/stats", b"", {}, 10).body)
        connection.close()
        return bool(said["model_stats"][0]["inference_stats"]["success"]["count"] == 3)

    async def late(self: Link, ask: Any, until: float | None) -> Any:
        reply = await real(self, ask, until)
        if armed and ask.path.endswith("/infer"):
            wait_until("the end of the one before", ended, 60)
            assert all(ended() for _ in range(10))  # by then the worker's loop has written its outputs too
        return reply

    async def main() -> None:
        nonlocal armed
        async with AsyncClient(place, connections=1) as client:
            for _ in range(2):
                expected = (await client.infer("quick", {"x": ROW}))["scores"]
                await client.infer("slow", {"x": ROW})
            task = asyncio.create_task(client.infer("slow", {"x": ARMED}))
            await asyncio.sleep(0.2)
            task.cancel()
            armed = True
            assert np.array_equal((await client.infer("quick", {"x": ROW}))["scores"], expected)
            assert task.cancelled()

    monkeypatch.setattr(Link, "ask", late)
    if given_up == "by its task":
        asyncio.run(main())
    else:
        with Client(place, connections=1) as client:
            for _ in range(2):
                expected = client.infer("quick", {"x": ROW})["scores"]
                client.infer("slow", {"x": ROW})
            with pytest.raises(TimedOutError):
                client.infer("slow", {"x": ARMED}, timeout_s=0.2)
            armed = True
            assert np.array_equal(client.infer("quick", {"x": ROW})["scores"], expected)
    assert regions(place) == []


@pytest.mark.parametrize("by", ["unix", "tcp"])
def test_a_task_that_is_cancelled_is_over(worker: ServingWorker, place: str, by: str) -> None:
    """On the one connection there is, at any moment: the next answer is the next request's, and no thread is left."""
    address = place if by == "unix" else worker.url.removeprefix("http://")

    async def main() -> None:
        async with AsyncClient(address, connections=1) as client:
            for number in range(3):
                await client.infer("echo-float32", {"x": LARGE + number})
            for number in range(12):
                worker.process.send_signal(signal.SIGSTOP)
                task = asyncio.create_task(client.infer("echo-float32", {"x": LARGE - 1 - number}))
                other = asyncio.create_task(client.infer("echo-float32", {"x": LARGE}))  # waits for the connection
                for _ in range(number):
                    await asyncio.sleep(0)
                if number % 3 == 0:
                    await asyncio.sleep(0.05)
                task.cancel()
                worker.process.send_signal(signal.SIGCONT)
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert np.array_equal((await other)["y"], LARGE)
                assert np.array_equal((await client.infer("echo-float32", {"x": LARGE + 5}))["y"], LARGE + 5)
                assert objects() == []
            assert threading.enumerate() == before

    before = threading.enumerate()
    asyncio.run(main())
    assert regions(place) == []


def test_many_tasks_over_a_worker_that_is_killed(tmp_path: Path, place: str) -> None:
    net = write_echo(tmp_path / "net", "float32")

    def start() -> ServingWorker:
        (tmp_path / "api.sock").unlink(missing_ok=True)
        started = start_worker(str(tmp_path / "api.sock"))
        started.channel.send(Expect((net.model,)))
        serve(started.channel, net, tmp_path / "net")
        return started

    async def main() -> None:
        worker = start()
        async with AsyncClient(place, connections=4) as client:

            async def ask(number: int) -> bool:
                given = np.full((4, SHARED_FROM if number % 2 else 3), number, np.float32)
                return np.array_equal((await client.infer("echo-float32", {"x": given}))["y"], given)

            assert all(await asyncio.gather(*(ask(number) for number in range(8))))
            worker.process.send_signal(signal.SIGSTOP)
            tasks = [asyncio.create_task(ask(number)) for number in range(40)]
            await asyncio.sleep(0.1)
            worker.process.kill()
            worker.process.wait()
            worker.channel.close()
            worker = await asyncio.to_thread(start)
            try:
                assert all(await asyncio.gather(*tasks))
            finally:
                worker.channel.close()
                worker.process.wait(20)

    asyncio.run(main())
    assert objects() == []


def test_a_client_that_is_closed_while_it_is_used(worker: ServingWorker, place: str) -> None:
    client = Client(place)
    client.infer("echo-float32", {"x": LARGE})
    worker.process.send_signal(signal.SIGSTOP)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(client.infer("echo-float32", {"x": LARGE})))
    thread.start()
    while client._core._free:
        os.sched_yield()
    client.close()
    worker.process.send_signal(signal.SIGCONT)
    thread.join(30)
    assert np.array_equal(answers[0]["y"], LARGE)
    assert regions(place) == []


def test_feedback_of_requests_by_their_ids(worker: ServingWorker, place: str) -> None:
    rows = np.eye(8, dtype=np.float32)
    with Client(place) as client:
        answers = [client.infer("classes", {"x": rows[:2]}, request_id=f"r{number}") for number in range(3)]
        said = [answer["scores"].argmax(axis=1) for answer in answers]
        labels: dict[str, Any] = {answer.request_id: found for answer, found in zip(answers, said, strict=True)}
        labels["r1"] = [int((said[1][0] + 1) % 3), int(said[1][1])]
        result = client.feedback("classes", labels | {"never": 1})
        assert (result.matched_rows, result.unknown_ids) == (6, 1)
        assert client.feedback("classes", labels).unknown_ids == 3
        assert client.infer("classes", {"x": rows}).request_id == ""

    async def main() -> None:
        async with AsyncClient(place) as client:
            answer = await client.infer("classes", {"x": rows[:1]}, request_id="one")
            assert (await client.feedback("classes", {answer.request_id: 0})).matched_rows == 1

    asyncio.run(main())
    worker.channel.send(Collect(9))
    window = worker.channel.receive()
    assert isinstance(window, Window)
    (model,) = (one for one in window.models if one.model == "classes")
    right = sum(count for label, predicted, count in model.confusion if label == predicted)
    assert sum(count for _, _, count in model.confusion) == 7
    assert 5 <= right < 7


@pytest.mark.parametrize(
    ("label", "field"),
    [
        (0.5, ("labels", "r")),
        ("cat", ("labels", "r")),
        (True, ("labels", "r")),
        ([[1]], ("labels", "r")),
        (-1, ("labels", "0", "label")),
        ([0, -1], ("labels", "0", "label", "1")),
    ],
)
def test_labels_that_are_none(worker: ServingWorker, place: str, label: Any, field: tuple[str, ...]) -> None:
    with Client(place) as client, pytest.raises(BadRequestError) as refused:
        client.feedback("classes", {"r": label})
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("inputs", "more", "field"),
    [
        ({}, {}, ("inputs", "x")),
        ({"x": LARGE, "z": LARGE}, {}, ("inputs", "z")),
        ({"x": LARGE.astype("float64")}, {}, ("inputs", "x", "datatype")),
        ({"x": LARGE.reshape(-1)}, {}, ("inputs", "x", "shape")),
        ({"x": np.array([1j])}, {}, ("inputs", "x", "datatype")),
        ({"x": LARGE}, {"outputs": ["z"]}, ("outputs", "z")),
        ({"x": LARGE}, {"priority": 101}, ("parameters", "priority")),
        ({"x": LARGE}, {"request_id": "i" * 257}, ("id",)),
    ],
)
def test_the_field_at_fault(
    worker: ServingWorker, place: str, inputs: dict[str, Any], more: dict[str, Any], field: tuple[str, ...]
) -> None:
    with Client(place) as client:
        for _ in range(2):
            with contextlib.suppress(BadRequestError):
                client.infer("echo-float32", {"x": LARGE})
            with pytest.raises(BadRequestError) as refused:
                client.infer("echo-float32", inputs, **more)
            assert refused.value.field == field
