"""`make bench-serving`: what the local inference API adds to a bare `session.run`, and its throughput beside others.

Every figure is measured in this run: the floor, the API and each peer take turns, and medians over the rounds count.
Peers are FastAPI, and those that `make setup-serving-peers` has made environments for; one runs at a time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgspec
import numpy as np
import onnxruntime
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from agent.client import Client
from agent.protocol.manifest import Manifest
from agent.protocol.messages import Exposure, ExposureMode
from agent.serving.ensemble_config import EnsembleConfig, StepConfig
from agent.serving.ipc import Declare, Expose, Exposed, Load, Loaded, Unservable
from agent.telemetry.sketches import Sketches
from tests.benchmarks import serving_peers
from tests.benchmarks.common import (
    Checks,
    closed_loop,
    manifest,
    oip_request,
    quantile,
    told_worker,
    worker,
    write_conv,
    write_mlp,
)
from tests.serving_worker import serve, start_worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it works")
    options = parser.parse_args()
    rounds, seconds = (1, 0.3) if options.short else (7, 1.5)
    checks = Checks("serving")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = write_conv(folder / "large", side=112, channels=64, layers=4)
        small = write_mlp(folder / "small", 512, 2)
        image = rng.random((1, 3, 112, 112), dtype=np.float32)
        row = rng.random((1, 512), dtype=np.float32)
        shutil.copyfile(folder / "small", folder / "alone")
        nets = {
            folder / "large": manifest("large", large, max_batch=8),
            folder / "small": manifest("small", small, max_batch=32),
            folder / "alone": manifest("alone", small, max_batch=1),
        }
        unix = folder / "api.sock"
        with worker(nets, unix) as address:
            added(checks, folder / "large", image, address, str(unix), rounds, seconds)
            batching(checks, row, address, rounds, seconds)
            throughput(checks, folder / "small", row, address, rounds, seconds)
        by_grpc(checks, folder / "large", nets[folder / "large"], image, folder / "grpc.sock", rounds, seconds)
        shadowing(checks, folder / "large", nets[folder / "large"], image, folder / "shadow.sock", rounds, seconds)
        sketching(checks, nets[folder / "large"], image, rounds)
        chained(checks, folder, nets, {"image": image, "row": row}, rounds, seconds)
    checks.print()


def added(
    checks: Checks, net: Path, image: Any, address: tuple[str, int], unix: str, rounds: int, seconds: float
) -> None:
    """What each way adds to the floor, at one client: 150 KB in, about 5 ms of work."""
    request = oip_request("large", image)
    bare = session(net)
    barest = net.with_name("barest.sock")
    ways: dict[str, Callable[[], list[float]]] = {
        "floor": lambda: bare_loop(bare, image, seconds),
        "barest server": lambda: closed_loop(str(barest), request, clients=1, seconds=seconds),
        "HTTP": lambda: closed_loop(address, request, clients=1, seconds=seconds),
        "Unix socket": lambda: closed_loop(unix, request, clients=1, seconds=seconds),
        "Python client, shared memory": lambda: client_loop(unix, image, seconds, shared=True),
        "Python client, body": lambda: client_loop(unix, image, seconds, shared=False),
    }
    with barest_server(barest, net, image, len(request)):
        found = take_turns(ways, rounds)
    floor50, floor99 = middle(found["floor"], 0.5), middle(found["floor"], 0.99)
    checks.report("floor p50, ms (bare session.run, 150 KB input)", floor50)
    checks.report(
        "barest server there can be, Unix socket: p50 added, ms", middle(found["barest server"], 0.5) - floor50
    )
    checks.report("Python client, body: p50 added, ms", middle(found["Python client, body"], 0.5) - floor50)
    for way, bound50 in (("HTTP", 0.5), ("Unix socket", 0.25), ("Python client, shared memory", 0.25)):
        checks.at_most(f"{way}: p50 added, ms", middle(found[way], 0.5) - floor50, bound50)
        checks.at_most(f"{way}: p99 added, ms", middle(found[way], 0.99) - floor99, 1.0)


@contextmanager
def barest_server(address: Path, net: Path, image: Any, size: int) -> Iterator[None]:
    """A process that reads so many bytes, infers on what is at their end, and says so: nothing less can be a server."""

    def answer() -> None:
        listener, bare = socket.socket(socket.AF_UNIX), session(net)
        listener.bind(str(address))
        listener.listen()
        came = memoryview(bytearray(size))
        row = np.frombuffer(came[size - image.nbytes :], np.uint8)
        while True:
            client, _ = listener.accept()
            with client:
                while read_whole(client, came):
                    outputs = bare.run(None, {"x": row.view(np.float32).reshape(image.shape)})
                    said = outputs[0].tobytes()
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said) + said)

    process = multiprocessing.get_context("fork").Process(target=answer, daemon=True)
    process.start()
    while not address.exists():
        time.sleep(0.01)
    try:
        yield
    finally:
        process.kill()
        process.join()


def read_whole(client: socket.socket, into: memoryview) -> bool:
    """Fill some memory; false when the client has gone."""
    there = 0
    while there < len(into):
        came = client.recv_into(into[there:])
        if not came:
            return False
        there += came
    return True


def by_grpc(checks: Checks, path: Path, net: Manifest, image: Any, unix: Path, rounds: int, seconds: float) -> None:
    """A call of tritonclient by gRPC beside the same by HTTP, at one client and one worker."""
    started = start_worker(str(unix), grpc=["127.0.0.1:0"])
    assert started.grpc is not None
    serve(started.channel, net, path)

    def loop(module: Any, address: str) -> Callable[[], list[float]]:
        client, tensor = module.InferenceServerClient(address), module.InferInput("x", list(image.shape), "FP32")
        tensor.set_data_from_numpy(image)

        def ask() -> list[float]:
            times, until = [], time.perf_counter() + seconds
            while (began := time.perf_counter()) < until:
                client.infer("large", [tensor])
                times.append(time.perf_counter() - began)
            return times

        return ask

    try:
        ways = {
            "HTTP": loop(triton_http, started.url.removeprefix("http://")),
            "gRPC": loop(triton_grpc, started.grpc.address),
        }
        found = take_turns(ways, rounds)
    finally:
        started.channel.close()
        started.process.wait(30)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        ratio = middle(found["gRPC"], share) / middle(found["HTTP"], share)
        checks.report(f"tritonclient: {name} by gRPC ÷ by HTTP, 150 KB input", ratio)


def shadowing(checks: Checks, path: Path, net: Manifest, image: Any, unix: Path, rounds: int, seconds: float) -> None:
    """What clients notice when a second version gets a copy of every request: one client that asks all the time."""
    request = oip_request("large", image)
    with told_worker({path: net}, unix) as (channel, address):
        other = msgspec.structs.replace(net, digest="b" * 64, version="2")
        channel.send(Load(7, "beside", other, str(path)))
        assert isinstance(channel.receive(), Loaded)

        def ask(share: float) -> list[float]:
            channel.send(Expose(8, "large", other.digest, Exposure(ExposureMode.SHADOW, share)))
            assert channel.receive() == Exposed(8, ok=True)
            return closed_loop(address, request, clients=1, seconds=seconds)

        found = take_turns({"alone": lambda: ask(0.0), "tenth": lambda: ask(0.1), "all": lambda: ask(1.0)}, rounds)
    for way, words in (("tenth", "a tenth"), ("all", "all")):
        for share, name in ((0.5, "p50"), (0.99, "p99")):
            ratio = middle(found[way], share) / middle(found["alone"], share)
            checks.report(f"shadow of {words}: {name} ÷ without", ratio)


def chained(
    checks: Checks, folder: Path, nets: dict[Path, Manifest], given: dict[str, Any], rounds: int, seconds: float
) -> None:
    """Two models asked as one, beside two requests one after the other: in a row, and at once."""
    shutil.copyfile(folder / "large", folder / "twin")
    twin = msgspec.structs.replace(nets[folder / "large"], model="twin")
    row = EnsembleConfig(
        "in-a-row",
        ("x",),
        ("y",),
        (StepConfig("1", "small", {"x": "x"}, {"y": "m"}), StepConfig("2", "alone", {"x": "m"}, {"y": "y"})),
    )
    beside = EnsembleConfig(
        "at-once",
        ("x",),
        ("a", "b"),
        (StepConfig("1", "large", {"x": "x"}, {"y": "a"}), StepConfig("2", "twin", {"x": "x"}, {"y": "b"})),
    )
    with told_worker({**nets, folder / "twin": twin}, folder / "chained.sock") as (channel, address):
        channel.send(Declare((row, beside)))
        assert channel.receive() == Unservable({})

        def ask(model: str, value: Any) -> Callable[[], list[float]]:
            return lambda: closed_loop(address, oip_request(model, value), clients=1, seconds=seconds)

        for ensemble, models, value in (
            ("in-a-row", ("small", "alone"), given["row"]),
            ("at-once", ("large", "twin"), given["image"]),
        ):
            found = take_turns({name: ask(name, value) for name in (ensemble, *models)}, rounds)
            together = middle(found[ensemble], 0.5)
            ratio = together / sum(middle(found[name], 0.5) for name in models)
            checks.at_most(f"ensemble {ensemble}: p50 ÷ that of two requests", ratio, 1.0)


def sketching(checks: Checks, net: Manifest, image: Any, rounds: int) -> None:
    """What the sketches of telemetry cost a request: 150 KB in, one each 5 ms by a clock that is made up."""
    answer = {"y": np.linspace(0, 1, 10, dtype=np.float32).reshape(1, 10)}
    found = []
    for _ in range(rounds):
        sketches = Sketches(net)
        times = []
        for number in range(2000):
            started = time.perf_counter()
            sketches.observe({"x": image}, answer, 1, number * 0.005)
            times.append(time.perf_counter() - started)
        found.append(times)
    mean = statistics.median(statistics.mean(times) for times in found)
    checks.at_most("sketches: mean a request, µs (200 a second)", mean * 1e6, 20.0)
    checks.report("sketches: the longest of 2,000 requests, µs", statistics.median(map(max, found)) * 1e6)


def throughput(checks: Checks, net: Path, row: Any, address: tuple[str, int], rounds: int, seconds: float) -> None:
    """Answers a second of a small model, beside servers of others with the same model and the same clients."""
    bare = session(net)
    checks.report("small model: floor p50, ms", middle([bare_loop(bare, row, seconds)], 0.5))
    for clients, goal in ((1, 1.0), (4, 1.0), (16, 4.0)):
        rate, ratio = beside(serving_peers.FASTAPI, net, row, address, clients, rounds, seconds, Path(sys.executable))
        checks.report(f"small model: answers a second at {clients} clients", rate)
        checks.at_least(f"small model: answers a second ÷ FastAPI's, {clients} clients", ratio, goal)
    missing = serving_peers.absent()
    for peer in serving_peers.PEERS:
        if peer.name not in missing:
            _, ratio = beside(peer, net, row, address, 16, rounds, seconds)
            checks.at_least(f"small model: answers a second ÷ {peer.name}'s, 16 clients", ratio, 5.0)


def beside(
    peer: serving_peers.Peer,
    net: Path,
    row: Any,
    address: tuple[str, int],
    clients: int,
    rounds: int,
    seconds: float,
    python: Path | None = None,
) -> tuple[float, float]:
    """Answers a second of ours, and how many times the peer's that is."""
    request = oip_request("small", row)
    with serving_peers.serving(peer, net, row, net.parent, python=python) as its_address:
        found = take_turns(
            {
                "shoal": lambda: closed_loop(address, request, clients=clients, seconds=seconds),
                "peer": lambda: closed_loop(its_address, peer.request(row), clients=clients, seconds=seconds),
            },
            rounds,
        )
    # Who answers nobody in that time counts as if it had answered one.
    rate = {way: max(1.0, statistics.median(len(times) for times in runs)) / seconds for way, runs in found.items()}
    return rate["shoal"], rate["shoal"] / rate["peer"]


def batching(checks: Checks, row: Any, address: tuple[str, int], rounds: int, seconds: float) -> None:
    """Whether a lone client pays for the queue's being drained into batches: the same net, served with and without."""
    found = take_turns(
        {
            "batched": lambda: closed_loop(address, oip_request("small", row), clients=1, seconds=seconds),
            "alone": lambda: closed_loop(address, oip_request("alone", row), clients=1, seconds=seconds),
        },
        rounds,
    )
    rate = {way: statistics.median(len(times) for times in runs) for way, runs in found.items()}
    checks.at_least("small model: one client, with batching ÷ without", rate["batched"] / rate["alone"], 0.97)


def take_turns(ways: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[list[float]]]:
    """Each way once a round, so that a noisy minute hits all of them."""
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            found[way].append(run())
    return found


def middle(runs: list[list[float]], share: float) -> float:
    """The median over rounds of a quantile, in milliseconds."""
    return statistics.median(quantile(times, share) for times in runs)


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def client_loop(unix: str, image: Any, seconds: float, *, shared: bool) -> list[float]:
    """Seconds of each answer that a program has from `agent.client`."""
    times: list[float] = []
    with Client(f"unix:{unix}", shared_memory=shared) as client:
        client.infer("large", {"x": image})
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter()
            client.infer("large", {"x": image})
            times.append(time.perf_counter() - started)
    return times


def bare_loop(bare: Any, row: Any, seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        bare.run(None, {"x": row})
        times.append(time.perf_counter() - started)
    return times


if __name__ == "__main__":
    main()
