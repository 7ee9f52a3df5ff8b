"""What the real worker does with more requests than it can answer, and which processors its threads use."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from agent.protocol.manifest import Manifest, Scheduling
from tests.benchmarks.common import manifest, told_worker, write_conv
from tests.fleet import wait_until

ROW = np.zeros((1, 3, 96, 96), np.float32)


@contextmanager
def serving(folder: Path, **changes: Any) -> Iterator[str]:
    """A worker that serves a net of some milliseconds; its address."""
    spec = write_conv(folder / "net", side=96, channels=64, layers=6)
    net: Manifest = msgspec.structs.replace(manifest("busy", spec, max_batch=1), **changes)
    with told_worker({folder / "net": net}, folder / "api.sock") as (_, (host, port)):
        yield f"{host}:{port}"


def infer(client: triton.InferenceServerClient, **how: Any) -> triton.InferResult:
    tensor = triton.InferInput("x", list(ROW.shape), "FP32")
    tensor.set_data_from_numpy(ROW)
    return client.infer("busy", [tensor], **how)


def infer_often(client: triton.InferenceServerClient, **how: Any) -> None:
    for _ in range(100):
        infer(client, **how)


def test_who_comes_to_a_full_queue_is_told_when_to_come_again(tmp_path: Path) -> None:
    with serving(tmp_path, scheduling=Scheduling(queue_limit=1)) as address:
        client = triton.InferenceServerClient(address)
        body, length = triton.InferenceServerClient.generate_request_body([tensor_of_row()])
        client.close()
        answers: list[tuple[int, str | None]] = []

        def ask() -> None:
            connection = http.client.HTTPConnection(address)
            for _ in range(10):
                headers = {"Inference-Header-Content-Length": str(length)}
                connection.request("POST", "/v2/models/busy/infer", body, headers)
                response = connection.getresponse()
                response.read()
                answers.append((response.status, response.getheader("Retry-After")))
            connection.close()

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    refused = [later for status, later in answers if status == 429]
    assert len(answers) == 80
    assert {status for status, _ in answers} == {200, 429}
    assert all(later is not None and int(later) >= 1 for later in refused)


def tensor_of_row() -> triton.InferInput:
    tensor = triton.InferInput("x", list(ROW.shape), "FP32")
    tensor.set_data_from_numpy(ROW)
    return tensor


def test_clients_say_how_urgent_a_request_is_and_how_long_it_may_wait(tmp_path: Path) -> None:
    with serving(tmp_path) as address:
        stop = threading.Event()

        def keep_busy() -> None:
            client = triton.InferenceServerClient(address)
            while not stop.is_set():
                infer(client)
            client.close()

        busy = [threading.Thread(target=keep_busy) for _ in range(8)]
        for one in busy:
            one.start()
        client = triton.InferenceServerClient(address)
        try:
            with pytest.raises(InferenceServerException, match=r"its turn did not come within the 0\.0001 s") as error:
                infer_often(client, priority=100, timeout=100)
            assert error.value.status() == "504"
            assert infer(client, priority=1, timeout=30_000_000).as_numpy("y").shape == (1, 10)
            with pytest.raises(InferenceServerException, match="priority is from 1"):
                infer(client, priority=101)
        finally:
            stop.set()
            for one in busy:
                one.join()
            client.close()


def threads_of_worker() -> dict[int, tuple[int, set[int]]]:
    """Of each thread of this process's only child: how nice it is, and which processors it may use."""
    (pid,) = [
        int(one)
        for thread in Path("/proc/self/task").iterdir()
        for one in (thread / "children").read_text().split()
        if b"agent.serving.worker" in Path(f"/proc/{one}/cmdline").read_bytes()
    ]
    return {
        int(thread.name): (os.getpriority(os.PRIO_PROCESS, int(thread.name)), os.sched_getaffinity(int(thread.name)))
        for thread in Path(f"/proc/{pid}/task").iterdir()
    }


def test_threads_that_a_runtime_starts_while_it_loads_are_as_urgent_as_the_rest(tmp_path: Path) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)

    def threads_once_loaded(threads: int) -> int:
        with serving(tmp_path, threads=threads) as address:
            infer(triton.InferenceServerClient(address))
            wait_until(
                "the thread that loaded to end", lambda: {nice for nice, _ in threads_of_worker().values()} == {usual}
            )
            return len(threads_of_worker())

    alone = threads_once_loaded(1)
    assert threads_once_loaded(3) == alone + 2, "the runtime has threads of its own"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor alone")
def test_a_model_runs_on_the_processors_that_it_is_given(tmp_path: Path) -> None:
    every = os.sched_getaffinity(0)
    core = max(every)
    with serving(tmp_path, threads=2, scheduling=Scheduling(cores=(core,))) as address:
        infer(triton.InferenceServerClient(address))
        affinities = [affinity for _, affinity in threads_of_worker().values()]
    assert affinities.count({core}) >= 2, "its own thread and the runtime's"
    assert every in affinities, "what reads requests is not bound"
