"""Devices of a LAN that answer requests in each other's place: real workers by mutual TLS, and a whole agent."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from agent.balancing_config import BalancingConfig
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import Scheduling
from agent.protocol.messages import DesiredDeployment
from agent.protocol.topics import DEVICE_HOST
from agent.update.source_tls import Credentials
from fleet_server.trust.ca import FleetCa
from tests.faults.device import NAME
from tests.fleet import wait_until
from tests.lan import FULL, QUEUE, Device, Lan, Reply, flood, request, row_of
from tests.real_device import POLICY, RealDevice
from tests.unit.agent.test_peers import enrolled

Three = tuple[Device, Device, Device]
ROOM = Scheduling(queue_limit=64)


@pytest.fixture(scope="module")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    found = Lan(tmp_path_factory.mktemp("lan"))
    yield found
    found.end()


@pytest.fixture(scope="module")
def serving(lan: Lan) -> Three:
    one, two, three = lan.devices("one", "two", "three")
    for device in (one, two, three):
        device.serve()
    return one, two, three


@pytest.fixture
def three(serving: Three) -> Three:
    """Each has the others for peers, and has counted nothing."""
    for device in serving:
        device.told(*(other for other in serving if other is not device))
        device.window()
    return serving


def statuses(replies: list[Reply]) -> dict[int, int]:
    found = [status for status, _, _ in replies]
    return {status: found.count(status) for status in set(found)}


def by_peers(replies: list[Reply]) -> list[str]:
    return [said["shoal-answered-by"] for _, said, _ in replies if "shoal-answered-by" in said]


class Since:
    """What devices have counted since then."""

    def __init__(self, *devices: Device) -> None:
        self._before = {device: device.metrics() for device in devices}

    def __call__(self, device: Device, name: str) -> float:
        return device.metrics()[name] - self._before[device].get(name, 0.0)


def test_what_one_has_no_room_for_others_answer_with_the_same_bytes(three: Three) -> None:
    one, *others = three
    since, count = Since(*three), 4
    with one.held():
        replies = one.flood(count)
    assert statuses(replies) == {200: count}
    forwarded = by_peers(replies)
    assert len(forwarded) == count
    assert set(forwarded) <= {other.place for other in others}
    alone = [one.ask(row_of(number)) for number in range(count)]
    assert [body for _, _, body in replies] == [body for _, _, body in alone]
    for (_, said, body), (_, said_alone, _) in zip(replies, alone, strict=True):
        assert said["inference-header-content-length"] == said_alone["inference-header-content-length"]
        assert said["content-length"] == str(len(body))
    windows = [device.window() for device in three]
    assert windows[0].requests == QUEUE + 1 + count, "those that held it, and what it answered itself"
    assert sum(window.requests for window in windows[1:]) == count, "each is counted once, where it was answered"
    assert [window.rejected for window in windows] == [0, 0, 0]
    assert since(one, "forwarded_requests_total") == count
    assert one.metrics()["peers"] == 2
    assert sum(since(other, "peer_requests_total answered") for other in others) == count


def test_a_request_is_forwarded_once_and_no_more(three: Three) -> None:
    """Two that are full, and each the other's peer."""
    one, two, _ = three
    one.told(two)
    two.told(one)
    since = Since(one, two)
    with one.held(), two.held():
        one.window()
        two.window()
        replies = one.flood(6)
        assert statuses(replies) == {429: 6}
        assert all(int(said["retry-after"]) >= 1 for _, said, _ in replies)
        asked = since(two, "peer_requests_total refused")
        assert 1 <= asked <= 6
        assert since(one, "forwards_unanswered_total full") == asked
        assert since(one, "peer_requests_total refused") == 0, "nothing came back"
        assert one.ask(row_of(1), {"Shoal-Hops": "1"})[0] == 429
        assert since(two, "peer_requests_total refused") == asked, "what was forwarded goes no further"
        assert (one.window().rejected, two.window().rejected) == (7, 0), "counted where they were asked"


def test_a_peer_that_is_killed_in_the_middle_costs_no_answer(lan: Lan, three: Three) -> None:
    one, _, _ = three
    dying, staying = lan.devices("dying", "staying")
    for device in (dying, staying):
        device.serve(scheduling=ROOM)
        device.told()
    one.told(dying, staying)
    since = Since(one)
    with one.held(), dying.held(waiting=0), ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(one.ask, row_of(number)) for number in range(4)]
        wait_until("one that waits there", lambda: dying.metrics()["queue_requests"], 10)
        os.kill(dying.worker.process.pid, signal.SIGKILL)
        replies = [each.result() for each in asked]
        assert statuses(one.flood(2)) == {200: 2}, "it is asked no more"
    assert statuses(replies) == {200: 4}
    assert by_peers(replies) == [staying.place] * 4
    assert all(body.endswith((2 * row_of(number)).tobytes()) for number, (_, _, body) in enumerate(replies))
    assert since(one, "forwards_unanswered_total failed") >= 1


class Stranger:
    """Answers TLS as a peer would, with a certificate of its own; what it was asked."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._context = context
        self.place = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.heard = b""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            plain, _ = self._listener.accept()
            with plain, self._context.wrap_socket(plain, server_side=True) as sock:
                sock.settimeout(10)
                self.heard = sock.recv(1000)

    def end(self) -> bytes:
        self._thread.join(10)
        self._listener.close()
        return self.heard


@pytest.mark.parametrize("who", ["another CA", "another fleet", "a browser"])
def test_strangers_are_neither_asked_nor_answered(lan: Lan, three: Three, tmp_path: Path, who: str) -> None:
    one, _, _ = three
    ca = lan.ca if who == "another fleet" else FleetCa.open(tmp_path / "ca", "f")
    credentials = Credentials(enrolled(tmp_path, ca, "stranger", "g" if who == "another fleet" else "f"))
    answers, asks = credentials.of_peers(), credentials.to_peers()
    assert answers is not None
    assert asks is not None
    answers.verify_mode = ssl.CERT_NONE  # it would take everybody
    asks.check_hostname, asks.verify_mode = False, ssl.CERT_NONE
    if who == "a browser":
        asks = ssl.create_default_context(cadata=lan.ca.bundle)
    stranger = Stranger(answers)
    one.told(trust=one.trust, peers=(stranger.place,))
    since = Since(one)
    with one.held():
        assert one.ask(row_of(1))[0] == 429
        assert since(one, "forwards_unanswered_total failed") == 1
    assert stranger.end() == b"", "it was told nothing"
    body, length = request(row_of(1))
    head = f"POST /v2/models/slow/versions/1/infer HTTP/1.1\r\nContent-Length: {len(body)}\r\n"
    head += f"Inference-Header-Content-Length: {length}\r\n\r\n"
    assert answered(one, asks, head.encode() + body) == b""
    assert since(one, "peer_requests_total answered") == 0


def answered(device: Device, context: ssl.SSLContext, asked: bytes) -> bytes:
    host, _, port = device.place.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=DEVICE_HOST) as sock:
                sock.sendall(asked)
                return sock.recv(1000)
        except (ssl.SSLError, ConnectionError):
            return b""


def test_the_owner_says_which_devices_may_ask(three: Three) -> None:
    one, two, _ = three
    one.told(two)
    with one.held():
        two.told(devices=("three",))
        assert one.ask(row_of(1))[0] == 429
        two.told(devices=("three", "one"))
        wait_until("an answer", lambda: one.ask(row_of(1))[0] == 200, 10)


def test_only_what_serves_the_same_artifact_is_asked(three: Three) -> None:
    """Unless the owner lets another variant of the version answer; another version never does."""
    one, variant, other = three
    one.serve(50.0, "net")
    variant.serve(40.0, "net")
    other.serve(30.0, "net", version="2")
    one.told(variant, other)
    since = Since(one)
    with one.held("net"):
        assert one.ask(row_of(1), model="net")[0] == 429
        assert since(one, "forwards_unanswered_total absent") == 2
        one.told(other, any_variant=True)
        assert one.ask(row_of(1), model="net")[0] == 429
        one.told(variant, other, any_variant=True)
        status, said, _ = one.ask(row_of(1), model="net")
        assert (status, said["shoal-answered-by"]) == (200, variant.place)


def test_how_long_a_request_may_wait_goes_with_it(three: Three) -> None:
    one, two, _ = three
    one.told(two)
    with one.held():
        assert one.ask(row_of(1), timeout=20_000_000)[0] == 200
        with two.held(waiting=0):
            assert one.ask(row_of(1), timeout=50_000)[0] == 429, "its turn did not come at the peer's"
            assert two.window().errors == 1, "it had waited there"


def test_a_request_that_names_shared_memory_stays(three: Three) -> None:
    one, two, _ = three
    one.told(two)
    region = Path("/dev/shm") / f"shoal-test-{os.getpid()}"
    region.write_bytes(row_of(3).tobytes())
    connection = http.client.HTTPConnection(*one.worker.address, timeout=30)
    try:
        key = json.dumps({"key": f"/{region.name}", "offset": 0, "byte_size": 12}).encode()
        connection.request("POST", f"/v2/systemsharedmemory/region/{region.name}/register", key)
        assert connection.getresponse().read() is not None
        memory = {"shared_memory_region": region.name, "shared_memory_byte_size": 12}
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": memory}
        with one.held():
            assert one.ask(row_of(1))[0] == 200, "others go"
            connection.request("POST", "/v2/models/slow/infer", json.dumps({"inputs": [tensor]}).encode())
            response = connection.getresponse()
            assert (response.status, b"too many" in response.read()) == (429, True)
    finally:
        connection.close()
        region.unlink()


def test_calls_by_grpc_are_forwarded_too(lan: Lan, three: Three) -> None:
    triton = pytest.importorskip("tritonclient.grpc")
    _, two, _ = three
    calls = lan.device("calls", grpc=True)
    calls.serve()
    calls.told(two)
    assert calls.worker.grpc is not None
    with calls.held(), triton.InferenceServerClient(calls.worker.grpc.address) as client:
        tensor = triton.InferInput("x", [1, 3], "FP32")
        tensor.set_data_from_numpy(row_of(7))
        assert client.infer("slow", [tensor]).as_numpy("y").tolist() == [[14.0, 14.0, 14.0]]
        assert calls.metrics()["forwarded_requests_total"] == 1


def test_an_agent_asks_those_that_its_desired_state_lists(
    lan: Lan, three: Three, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole agent, with the certificate that it enrolled with."""
    monkeypatch.setenv("PYTHONPATH", lan.environment["PYTHONPATH"])
    _, two, _ = three
    # The peer has room for whatever comes at once, however late it begins with the first.
    manifest = msgspec.structs.replace(two.serve(300.0, "net", scheduling=ROOM), scheduling=FULL)
    enrolled(lan.folder, lan.ca, NAME)
    wanted = BalancingConfig(forward=True, serve=True, listen="127.0.0.3:0", address="127.0.0.3:8473", lan="hall")
    with RealDevice(lan.folder / NAME, monkeypatch, balancing=wanted) as device:
        assert device.link is not None
        facts = device.link.reports[-1].facts
        assert (facts.balancing_address, facts.balancing_lan) == ("127.0.0.3:8473", "hall")
        device.contents[manifest.digest] = b"300.0"
        signed = msgspec.Raw(msgspec.json.encode(manifest))
        device.desire(DesiredDeployment("d1", signed, probation=POLICY), peers=(two.place, "93.184.216.34:80"))
        device.await_phase("d1", Phase.ACTIVE)
        host, _, port = device.address.partition(":")
        replies = flood((host, int(port)), QUEUE + 1 + 3, "net")
    assert statuses(replies) == {200: QUEUE + 1 + 3}
    assert set(by_peers(replies)) == {two.place}


def test_peers_may_infer_and_nothing_else(lan: Lan, three: Three) -> None:
    one, _, _ = three
    manifest = one.serve(5.0, "fast")
    context = Credentials(enrolled(lan.folder, lan.ca, "caller")).to_peers()
    assert context is not None
    host, _, port = one.place.partition(":")
    body, length = request(row_of(2))
    said = {"Inference-Header-Content-Length": str(length)}
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        connection = http.client.HTTPConnection(host)
        connection.sock = context.wrap_socket(plain, server_hostname=DEVICE_HOST)

        def ask(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Reply:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()

        path = "/v2/models/fast/versions/1/infer"
        status, found, _ = ask("POST", path, body, {**said, "Shoal-Artifact": manifest.digest})
        assert status == 200
        assert float(found["shoal-infer-ms"]) >= 5
        assert ask("POST", path, body, {**said, "Shoal-Artifact": "b" * 64})[0] == 404
        assert ask("POST", path, body, {**said, "Shoal-Artifact": "x"})[0] == 400
        assert ask("POST", path, body, {**said, "Shoal-Timeout-Ms": "x"})[0] == 400
        assert ask("POST", path, b"{}")[0] == 400
        for method, other in (
            ("GET", "/metrics"),
            ("GET", "/v2/models/fast"),
            ("POST", "/v2/models/fast/infer"),
            ("POST", "/v2/models/fast/versions/2/infer"),
            ("POST", "/v2/models/fast/feedback"),
            ("POST", "/v2/repository/index"),
            ("GET", path),
        ):
            assert ask(method, other, body if method == "POST" else b"", said)[0] == 404, other
        region = {"shared_memory_region": "r", "shared_memory_byte_size": 12}
        named = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": region}]}
        assert ask("POST", path, json.dumps(named).encode())[0] == 400, "a peer is not this machine"
        connection.close()
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        plain.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(100)


def test_a_worker_has_no_use_for_tls_where_it_is_off(lan: Lan) -> None:
    one = lan.plain("plain")
    one.serve(1.0)
    assert b"libssl" not in Path(f"/proc/{one.worker.process.pid}/maps").read_bytes()
    assert "peers" not in one.metrics()
