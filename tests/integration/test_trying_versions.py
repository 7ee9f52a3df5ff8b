"""The worker tries a version beside what serves: golden inputs, room, counts, and nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import numpy as np
import pytest

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest
from agent.runtimes import open_runtime
from agent.serving.ipc import (
    Activate,
    Activated,
    Collect,
    FromWorker,
    Load,
    Loaded,
    Peek,
    Peeked,
    Unload,
    Window,
)
from agent.telemetry.host import free_memory_mb
from agent.trial import golden
from agent.trial.dataset import Dataset
from tests.fleet import write_classifier
from tests.integration.test_local_api import manifest
from tests.serving_worker import start_worker
from tests.traps import ARMED, write_deadly, write_trapped

ROWS = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
AnswerT = TypeVar("AnswerT", bound=FromWorker)


class Worker:
    """A worker process, as the supervisor sees it."""

    def __init__(self) -> None:
        started = start_worker()
        self.process, self.channel, self.url = started.process, started.channel, started.url
        self._number = 0

    def wait(self, kind: type[AnswerT]) -> AnswerT:
        message = self.channel.receive()
        assert isinstance(message, kind), message
        return message

    def load(self, path: Path, digest: str, version: str, **fields: Any) -> Loaded:
        self.channel.send(Load(1, f"deployment-{version}", manifest(digest, version), str(path), **fields))
        return self.wait(Loaded)

    def activate(self, digest: str) -> None:
        self.channel.send(Activate(2, "tri", digest * 64))
        assert self.wait(Activated) == Activated(2, ok=True)

    def peek(self) -> Peeked:
        self.channel.send(Peek(3))
        return self.wait(Peeked)

    def collect(self) -> Window:
        self.channel.send(Collect(4))
        return self.wait(Window)

    def ask(self, rows: np.ndarray = ROWS[:1], client: httpx.Client | None = None) -> httpx.Response:
        tensor = {"name": "x", "datatype": "FP32", "shape": list(rows.shape), "data": rows.flatten().tolist()}
        post = client.post if client else httpx.post
        return post(f"{self.url}/v2/models/tri/infer", json={"inputs": [tensor]}, timeout=60)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """A worker that answers with version 1."""
    write_classifier(tmp_path / "one")
    worker = Worker()
    try:
        assert worker.load(tmp_path / "one", "a", "1").code is None
        worker.activate("a")
        yield worker
    finally:
        worker.channel.close()
        worker.process.wait(20)


def golden_file(path: Path, built: Path, net: Manifest) -> str:
    """Golden inputs of a file, as a build writes them."""
    runtime = open_runtime(net, built)
    rows = golden.pick_rows(Dataset({"x": ROWS}, None, len(ROWS)))
    answers = golden.answer_rows(runtime, rows)
    golden.write(golden.made(rows, answers, answers), path)
    return str(path)


def test_a_version_that_answers_as_it_did_where_it_was_built_is_loaded(worker: Worker, tmp_path: Path) -> None:
    write_classifier(tmp_path / "two", seed=5)
    path = golden_file(tmp_path / "golden", tmp_path / "two", manifest("b", "2"))
    loaded = worker.load(tmp_path / "two", "b", "2", golden_path=path, need_mb=1.0)
    assert (loaded.code, loaded.provider) == (None, "cpu")
    assert loaded.before_mb is not None
    assert worker.ask().json()["model_version"] == "1", "nothing is swapped until it is told to"


def test_a_version_that_answers_otherwise_is_refused_and_leaves_nothing(worker: Worker, tmp_path: Path) -> None:
    write_classifier(tmp_path / "right")
    write_classifier(tmp_path / "wrong", right=False)
    path = golden_file(tmp_path / "golden", tmp_path / "right", manifest("b", "2"))
    loaded = worker.load(tmp_path / "wrong", "b", "2", golden_path=path)
    assert loaded.code is WireErrorCode.GOLDEN_MISMATCH
    assert loaded.detail.startswith("output 'scores', row 0 of the golden inputs: the answer is ")
    assert "it ran on cpu by onnxruntime" in loaded.detail
    assert [one.deployment_id for one in worker.peek().models] == ["deployment-1"]
    Path(path).write_bytes(b"not a file of golden inputs")
    again = worker.load(tmp_path / "wrong", "b", "2", golden_path=path)
    assert again.code is WireErrorCode.GOLDEN_MISMATCH
    assert "can't be read" in again.detail
    assert worker.ask().status_code == 200


def test_where_memory_is_short_nothing_is_loaded(worker: Worker, tmp_path: Path) -> None:
    loaded = worker.load(tmp_path / "one", "b", "2", need_mb=1e9)
    assert loaded.code is WireErrorCode.MEMORY_SHORT
    assert "needs 1000000000 MiB" in loaded.detail
    assert worker.ask().json()["model_version"] == "1"


def test_memory_that_a_control_group_allows_is_all_there_is(tmp_path: Path) -> None:
    machine = free_memory_mb(tmp_path, tmp_path / "none")
    assert machine > 100
    group = tmp_path / "system" / "shoal"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/system/shoal\n")
    for folder, limit in ((group, "max"), (group.parent, str(80 << 20))):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(50 << 20))
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {20 << 20}\n")
    assert free_memory_mb(tmp_path, tmp_path / "own") == 50.0


def test_looking_leaves_windows_as_they_are_and_no_count_is_lost(worker: Worker, tmp_path: Path) -> None:
    assert worker.load(tmp_path / "one", "b", "2").code is None
    for _ in range(3):
        worker.ask()
    assert [one.requests for one in worker.peek().models] == [3, 0]
    assert [one.requests for one in worker.collect().models] == [3, 0]
    worker.activate("b")
    worker.ask()
    worker.ask(ROWS[:1, :7])
    first, second = worker.peek().models
    assert (first.requests, sum(first.recent.values())) == (3, 3), "what a window took is still counted"
    assert (second.requests, second.rejected, sum(second.latency.values())) == (1, 1, 1)
    worker.activate("a")
    worker.channel.send(Unload("tri", "b" * 64))
    window = worker.collect()
    by_version = {one.version: (one.requests, one.rejected) for one in window.models}
    assert by_version == {"1": (0, 0), "2": (1, 1)}, "what was taken out is collected once more"
    time.sleep(0.2)
    worker.collect()
    assert {one.version for one in worker.collect().models} == {"1"}


def test_a_file_that_ends_the_process_at_load_and_one_that_does_on_a_request(worker: Worker, tmp_path: Path) -> None:
    write_deadly(tmp_path / "deadly")
    worker.channel.send(Load(1, "d", manifest("b", "2"), str(tmp_path / "deadly")))
    assert worker.channel.receive() is None
    assert worker.process.wait(20) < 0
    other = Worker()
    write_trapped(tmp_path / "crash", "crash")
    assert other.load(tmp_path / "crash", "b", "2").code is None
    other.activate("b")
    assert other.ask().status_code == 200
    sprung = ROWS[:1].copy()
    sprung[0, 7] = ARMED + 1
    with pytest.raises(httpx.TransportError):
        other.ask(sprung)
    assert other.process.wait(20) < 0
    other.channel.close()


PAUSE_S = 0.01  # of each client: a load takes what requests leave of the processors, and needs some


def test_nobody_waits_for_a_load_and_no_request_fails_over_swap_and_going_back(worker: Worker, tmp_path: Path) -> None:
    """Golden rows of a slow version keep its load busy for seconds, while three clients ask the one before."""
    write_trapped(tmp_path / "slow", "slow", rounds=40_000)
    rows = tuple({"x": np.where(np.arange(8) == 7, ARMED + 1, row).astype(np.float32)[None]} for row in ROWS[:2])
    net = manifest("b", "2")
    answers = golden.answer_rows(open_runtime(net, tmp_path / "slow"), rows)
    golden.write(golden.made(rows, answers, answers), tmp_path / "golden")
    stop = threading.Event()
    times: list[tuple[float, float]] = []
    versions: list[str] = []
    failures: list[object] = []

    def client() -> None:
        with httpx.Client() as connection:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    answer = worker.ask(client=connection)
                    versions.append(answer.json()["model_version"])
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    failures.append(error)
                times.append((began, time.monotonic() - began))
                time.sleep(PAUSE_S)

    clients = [threading.Thread(target=client) for _ in range(3)]
    for thread in clients:
        thread.start()
    began = time.monotonic()
    loaded = worker.load(tmp_path / "slow", "b", "2", golden_path=str(tmp_path / "golden"))
    took = time.monotonic() - began
    assert loaded.code is None, loaded.detail
    for _ in range(10):
        worker.activate("b")
        time.sleep(0.05)
        worker.activate("a")
        time.sleep(0.05)
    worker.channel.send(Unload("tri", "b" * 64))
    time.sleep(0.2)
    stop.set()
    for thread in clients:
        thread.join(30)
    assert failures == []
    assert set(versions) == {"1", "2"}
    during = [seconds for start, seconds in times if began <= start <= began + took]
    assert took > 0.5, "the load was no load"
    assert len(during) > 20
    assert max(seconds for _, seconds in times) < took / 2, "somebody waited for the load"
    assert msgspec.structs.asdict(worker.collect().models[0])["errors"] == 0
