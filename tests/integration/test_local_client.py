"""The client for programs on the device, beside a real worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from agent.client import (
    AsyncClient,
    BadRequestError,
    BusyError,
    Client,
    InferenceError,
    ModelFailedError,
    NotReadyError,
    TimedOutError,
    UnknownModelError,
)
from agent.client.connection import Connection
from agent.client.sizes import SHARED_FROM
from agent.serving.ipc import Expect
from tests.serving_worker import KINDS, running_worker, serve, start_worker, write_echo, write_sums

SHM = Path("/dev/shm")
LARGE = np.arange(SHARED_FROM, dtype=np.float32).reshape(4, -1)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    unix_socket = folder / "api.sock"
    with running_worker(unix_socket) as (channel, address, _):
        serve(channel, write_sums(folder / "sums"), folder / "sums")
        for kind in KINDS:
            serve(channel, write_echo(folder / kind, kind), folder / kind)
        yield {"unix": f"unix:{unix_socket}", "tcp": address}


@pytest.fixture(params=["unix", "tcp"])
def client(places: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Client]:
    with Client(places[request.param]) as client:
        yield client
    assert objects() == []


def objects() -> list[str]:
    """What this process has in shared memory."""
    return [path.name for path in SHM.glob(f"shoal-client-{os.getpid()}-*")]


def regions(address: str) -> list[str]:
    """What the worker knows of it."""
    unix = address.removeprefix("unix:") if address.startswith("unix:") else ""
    connection = Connection(address, unix)
    reply = connection.ask("GET", "/v2/systemsharedmemory/status", b"", {}, 10)
    connection.close()
    return [one["name"] for one in json.loads(reply.body)]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_tensor_comes_back_as_it_was(client: Client, kind: str) -> None:
    if kind == "string":
        given = np.array([["grüß", "", "x" * 300], ["a", "b", "c"]], object)
    elif kind == "bool":
        given = np.array([[True, False, True]])
    else:
        given = np.array([[0, 1, 2], [3, 4, 5]], kind)
    answer = client.infer(f"echo-{kind}", {"x": given})
    assert list(answer) == ["y"]
    assert answer["y"].dtype == (object if kind == "string" else given.dtype)
    assert answer["y"].tolist() == given.tolist()


def test_what_is_no_row_of_memory_and_of_the_other_byte_order(client: Client) -> None:
    strided = np.arange(40, dtype=np.float32).reshape(4, 10)[::2, ::3]
    assert client.infer("echo-float32", {"x": strided})["y"].tolist() == strided.tolist()
    assert client.infer("echo-int64", {"x": strided.astype(">i8")})["y"].tolist() == strided.tolist()
    assert client.infer("echo-float32", {"x": strided.T})["y"].tolist() == strided.T.tolist()


def test_two_inputs_and_some_outputs(client: Client) -> None:
    one = np.array([[1, 2]], np.float32)
    assert set(client.infer("sums", {"a": one, "b": one})) == {"sum", "difference"}
    answer = client.infer("sums", {"a": one, "b": one}, outputs=["sum"], version="1", priority=1, request_id="r1")
    assert {name: array.tolist() for name, array in answer.items()} == {"sum": [[2, 4]]}


def test_large_inputs_lie_in_shared_memory_that_nobody_else_finds(places: dict[str, str]) -> None:
    before = set(regions(places["unix"]))
    with Client(places["unix"]) as client:
        assert client.infer("echo-float32", {"x": LARGE})["y"].tolist() == LARGE.tolist()
        assert len(set(regions(places["unix"])) - before) == 1
        assert objects() == []
        larger = np.concatenate([LARGE] * 20, axis=1)
        for given in (larger, LARGE + 1, larger + 1, LARGE):
            assert np.array_equal(client.infer("echo-float32", {"x": given})["y"], given)
            assert len(set(regions(places["unix"])) - before) == 1
    assert set(regions(places["unix"])) <= before
    with Client(places["unix"], shared_memory=False) as client:
        assert np.array_equal(client.infer("echo-float32", {"x": LARGE})["y"], LARGE)
        assert set(regions(places["unix"])) <= before


def test_strings_and_several_inputs_in_shared_memory(places: dict[str, str]) -> None:
    with Client(places["unix"]) as client:
        texts = np.array([["ä" * 50_000, "b" * 17]], object)
        assert client.infer("echo-string", {"x": texts})["y"].tolist() == texts.tolist()
        rows = np.ones((8_192, 2), np.float32)
        answer = client.infer("sums", {"a": rows, "b": 2 * rows})
        assert (answer["sum"] == 3).all()
        assert (answer["difference"] == -1).all()
        assert any(name.startswith(f"shoal-client-{os.getpid()}-") for name in regions(places["unix"]))


def test_without_a_place_for_shared_memory_the_body_has_it_all(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_given: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("agent.client.memory.os.posix_fallocate", full)
    with Client(places["unix"]) as client:
        assert np.array_equal(client.infer("echo-float32", {"x": LARGE})["y"], LARGE)
        assert objects() == []


def test_programs_that_end_without_closing_and_that_are_killed_leave_nothing(places: dict[str, str]) -> None:
    code = f"""
import os, signal, sys
import numpy as np
from agent.client import Client
client = Client({places["unix"]!r})
client.infer("echo-float32", {{"x": np.ones((4, {SHARED_FROM}), np.float32)}})
print(os.getpid())
sys.stdout.flush()
if sys.argv[1:]:
    os.kill(os.getpid(), signal.SIGKILL)
"""

    def left(*arguments: str) -> list[Path]:
        pid = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False).stdout.decode()
        return list(SHM.glob(f"shoal-client-{pid.strip()}-*"))

    assert left() == []
    assert left("killed") == []
    unopened = SHM / f"shoal-client-{2**22 + 1}-0"  # as of a program that was killed before the worker had opened it
    unopened.touch()
    with Client(places["unix"]) as client:
        client.infer("echo-float32", {"x": LARGE})
    assert not unopened.exists()


def test_many_threads_share_a_client(client: Client) -> None:
    def ask(number: int) -> bool:
        given = np.full((4, SHARED_FROM if number % 2 else 3), number, np.float32)
        return np.array_equal(client.infer("echo-float32", {"x": given})["y"], given)

    with ThreadPoolExecutor(20) as threads:
        assert all(threads.map(ask, range(100)))


@pytest.mark.parametrize(
    ("model", "inputs", "error", "said"),
    [
        ("nothing", {"x": [1.0]}, UnknownModelError, "nothing"),
        ("sums", {"a": np.ones((1, 2), np.float32)}, BadRequestError, "b is missing"),
        (
            "sums",
            {"a": np.ones((1, 3), np.float32), "b": np.ones((1, 2), np.float32)},
            BadRequestError,
            "'a' has shape",
        ),
        ("echo-float32", {"x": np.ones((1, 2))}, BadRequestError, "FP64"),
        ("echo-float32", {"x": np.array([1 + 2j])}, BadRequestError, "'x'"),
        ("a/b", {"x": [1.0]}, UnknownModelError, "a/b"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(client: Client, model: str, inputs: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        client.infer(model, inputs)
    assert issubclass(error, InferenceError)


def test_another_version_than_the_one_that_serves(client: Client) -> None:
    with pytest.raises(UnknownModelError, match="version 2"):
        client.infer("sums", {}, version="2")


def test_what_a_model_says_of_itself(client: Client) -> None:
    assert client.metadata("sums")["inputs"][0] == {"name": "a", "datatype": "FP32", "shape": [-1, 2]}
    assert (client.ready("sums"), client.ready("nothing")) == (True, False)
    client.wait_until_ready("sums", 5)
    with pytest.raises(NotReadyError, match="nothing"):
        client.wait_until_ready("nothing", 0.2)


def test_asyncio(places: dict[str, str]) -> None:
    async def main() -> None:
        async with AsyncClient(places["unix"], connections=3) as client:
            await client.wait_until_ready("sums")
            assert (await client.metadata("sums"))["name"] == "sums"
            given = [np.full((1, 2), number, np.float32) for number in range(20)]
            answers = await asyncio.gather(*(client.infer("echo-float32", {"x": one}) for one in given))
            assert [one["y"].tolist() for one in answers] == [one.tolist() for one in given]
            with pytest.raises(UnknownModelError):
                await client.infer("nothing", {})

    asyncio.run(main())


def test_an_agent_that_is_not_there_is_waited_for_and_then_said_so(tmp_path: Path) -> None:
    with Client(f"unix:{tmp_path}/none.sock", timeout_s=0.3) as client:
        assert not client.ready("m")
        with pytest.raises(NotReadyError, match="No such file"):
            client.infer("m", {"x": [1.0]})


def test_a_worker_that_starts_again_in_between_costs_nothing(tmp_path: Path) -> None:
    """Its shared memory is told of anew; a model that is being loaded is waited for."""
    unix_socket = tmp_path / "api.sock"
    net = write_echo(tmp_path / "net", "float32")
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(f"unix:{unix_socket}"))
        for _ in range(2):
            started = start_worker(str(unix_socket))
            started.channel.send(Expect((net.model,)))
            threading.Timer(0.5, serve, (started.channel, net, tmp_path / "net")).start()
            assert np.array_equal(client.infer(net.model, {"x": LARGE})["y"], LARGE)
            assert np.array_equal(client.infer(net.model, {"x": LARGE + 1})["y"], LARGE + 1)
            started.process.kill()
            started.process.wait()
            started.channel.close()
            unix_socket.unlink()
    assert objects() == []


def test_a_request_that_ends_the_worker_is_not_sent_for_ever(tmp_path: Path) -> None:
    stubs = tmp_path / "s"
    ended = _Stub(stubs, [b""], connections=9)
    with Client(f"unix:{stubs}") as client, pytest.raises(ModelFailedError, match="ended 3 times"):
        client.infer("m", {"x": [1.0]})
    assert len(ended.asked) == 3


def test_time_that_is_over(client: Client) -> None:
    with pytest.raises(TimedOutError):
        client.infer("sums", {"a": [[1.0, 2.0]], "b": [[1.0, 2.0]]}, timeout_s=0)


class _Stub(threading.Thread):
    """An API that answers as it is told to; for what a real one says only under load."""

    def __init__(self, path: Path, answers: list[bytes], connections: int = 1) -> None:
        super().__init__(daemon=True)
        self._answers, self._connections = answers, connections
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self.asked: list[float] = []
        self.start()

    def run(self) -> None:
        with self._socket:
            for number in range(self._connections):
                connection, _ = self._socket.accept()
                with connection, connection.makefile("rb") as stream:
                    self._serve(connection, stream)
                    if number + 1 == self._connections:
                        connection.recv(1)  # until the client has gone

    def _serve(self, connection: socket.socket, stream: BinaryIO) -> None:
        for answer in self._answers:
            length = 0
            while (line := stream.readline().strip().lower()) or not length:
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            stream.read(length)
            self.asked.append(time.monotonic())
            connection.sendall(answer)


def said(status: str, body: bytes = b"{}", **headers: str) -> bytes:
    told = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{told}\r\n".encode() + body


def test_a_full_queue_is_asked_again_when_it_says(tmp_path: Path) -> None:
    done = b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1],"data":[2.5]}]}'
    stub = _Stub(tmp_path / "s", [said("429 Busy", Retry_After="1"), said("200 OK", done)])
    with Client(f"unix:{tmp_path}/s") as client:
        assert client.infer("m", {"x": [1.0]})["y"].tolist() == [2.5]
    assert stub.asked[1] - stub.asked[0] >= 1
    _Stub(tmp_path / "t", [said("429 Busy", b'{"error":"too many"}', Retry_After="9")])
    with Client(f"unix:{tmp_path}/t") as client, pytest.raises(BusyError, match="too many"):
        client.infer("m", {"x": [1.0]}, timeout_s=2)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"outputs":[{"name":"y","datatype":"FP32","shape":[3],"data":[1]}]}'])
def test_an_answer_that_makes_no_sense_is_said_so(tmp_path: Path, body: bytes) -> None:
    _Stub(tmp_path / "s", [said("200 OK", body)])
    with Client(f"unix:{tmp_path}/s") as client, pytest.raises(InferenceError, match="can't be read"):
        client.infer("m", {"x": [1.0]})
