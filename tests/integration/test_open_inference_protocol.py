"""The Open Inference Protocol's REST interface as its specification has it, and what becomes of hostile bytes."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.serving_worker import running_worker, serve, write_echo, write_sums
from tests.worker_forge import ForgedWorker

DATA = [[1.0, 2.0], [3.0, 4.0]]
Served = tuple[str, "subprocess.Popen[bytes] | ForgedWorker"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    with running_worker() as (channel, address, process):
        serve(channel, write_sums(folder / "sums"), folder / "sums")
        serve(channel, write_echo(folder / "echo", "string"), folder / "echo")
        yield address, process


def ask(served: Served, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection(served[0], timeout=20)) as connection:
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def request(first: Any = None, second: Any = None, **more: Any) -> dict[str, Any]:
    inputs = [{"name": name, "shape": [2, 2], "datatype": "FP32"} for name in ("a", "b")]
    return {"inputs": [{**inputs[0], "data": first or DATA}, {**inputs[1], "data": second or DATA}], **more}


def test_health_and_metadata(served: Served) -> None:
    assert ask(served, "GET", "/v2/health/live") == (200, {"live": True})
    assert ask(served, "GET", "/v2/health/ready") == (200, {"live": True, "ready": True})
    assert ask(served, "GET", "/v2/models/sums/ready") == (200, {"name": "sums", "ready": True})
    assert ask(served, "GET", "/v2/models/sums/versions/1/ready") == (200, {"name": "sums", "ready": True})
    status, server = ask(served, "GET", "/v2")
    assert status == 200
    assert set(server) == {"name", "version", "extensions"}
    status, model = ask(served, "GET", "/v2/models/sums/versions/1")
    assert status == 200
    assert (model["name"], model["versions"]) == ("sums", ["1"])
    assert model["outputs"][0] == {"name": "sum", "datatype": "FP32", "shape": [-1, 2]}


@pytest.mark.parametrize("data", [DATA, [1.0, 2.0, 3.0, 4.0]], ids=["nested", "flat"])
def test_an_inference(served: Served, data: Any) -> None:
    asked = request(data, data, id="42", parameters={"of": "mine"}, outputs=[{"name": "sum"}])
    assert ask(served, "POST", "/v2/models/sums/infer", asked) == (
        200,
        {
            "model_name": "sums",
            "model_version": "1",
            "id": "42",
            "outputs": [{"name": "sum", "datatype": "FP32", "shape": [2, 2], "data": [2.0, 4.0, 6.0, 8.0]}],
        },
    )
    status, every = ask(served, "POST", "/v2/models/sums/versions/1/infer", request(data, data))
    assert status == 200
    assert [one["name"] for one in every["outputs"]] == ["sum", "difference"]


def test_strings_in_json(served: Served) -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "BYTES", "data": [["ja", "né"]]}
    status, answer = ask(served, "POST", "/v2/models/echo-string/infer", {"inputs": [tensor]})
    assert status == 200
    assert answer["outputs"][0]["data"] == ["ja", "né"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("GET", "/v2/models/nobody", None, 404, "does not run here"),
        ("GET", "/v2/models/sums/versions/9/ready", None, 404, "version 9"),
        ("POST", "/v2/models/nobody/infer", request(), 404, "sums"),
        ("GET", "/v2/models/sums/infer", None, 405, "not offered"),
        ("GET", "/nowhere", None, 404, "begins at /v2"),
        ("POST", "/v2/models/sums/infer", b"{", 400, "JSON"),
        ("POST", "/v2/models/sums/infer", {}, 400, "inputs"),
        ("POST", "/v2/models/sums/infer", request(["1", 2, 3, 4]), 400, "'a'"),
        ("POST", "/v2/models/sums/infer", request([1, 2, 3]), 400, "'a'"),
        ("POST", "/v2/models/sums/infer", request(outputs=[{"name": "z"}]), 400, "no output 'z'"),
    ],
)
def test_errors_say_what_is_wrong(served: Served, method: str, path: str, body: Any, status: int, said: str) -> None:
    found, answer = ask(served, method, path, body)
    assert found == status
    assert answer.keys() - {"field"} == {"error"}
    assert said in answer["error"]


def test_no_bytes_end_the_worker_or_fill_its_memory(served: Served) -> None:
    """Whole requests of which bytes were changed, cut off, doubled: each ends in an answer below 500, or in none."""
    good = json.dumps(request()).encode()
    head = f"POST /v2/models/sums/infer HTTP/1.1\r\nHost: d\r\nContent-Length: {len(good)}\r\nConnection: close\r\n\r\n"
    huge = json.dumps(request()).replace("[2, 2]", "[1000000000, 2]").encode()
    lengths = "Content-Length: 29\r\nConnection: close"
    register = f"POST /v2/systemsharedmemory/region/r/register HTTP/1.1\r\n{lengths}\r\n\r\n"
    seeds = [
        head.encode() + good,
        head.encode().replace(b"Connection", b"Content-Encoding: gzip\r\nConnection") + good,
        head.encode().replace(str(len(good)).encode(), str(len(huge)).encode()) + huge,
        register.encode() + b'{"key": "/..", "byte_size":1}',
    ]
    host, _, port = served[0].rpartition(":")
    chance = random.Random(7)
    memory = psutil.Process(served[1].pid)
    before = memory.memory_info().rss
    for _ in range(300):
        sent = bytearray(chance.choice(seeds))
        for _ in range(chance.choice((0, 1, 3))):
            sent[chance.randrange(len(sent))] = chance.randrange(256)
        if chance.random() < 0.3:
            sent = sent[: chance.randrange(len(sent))]
        with socket.create_connection((host, int(port)), 20) as sock, contextlib.suppress(ConnectionError):
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            got = b"".join(iter(lambda sock=sock: sock.recv(65536), b""))  # type: ignore[misc]
            assert not got.startswith(b"HTTP/1.1 5"), (bytes(sent), got)
    assert served[1].poll() is None
    assert memory.memory_info().rss - before < 64 << 20
    assert ask(served, "POST", "/v2/models/sums/infer", request())[0] == 200
