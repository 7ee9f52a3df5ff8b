"""What the benchmarks share: checks and their JSON line, nets, a worker, a broker, clients, and what a process uses."""

from __future__ import annotations

import json
import multiprocessing
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.serving.framing import FrameChannel
from fleet_server.gateway.broker import find_mosquitto
from tests.fleet import free_port
from tests.serving_worker import serve, start_worker

Array = npt.NDArray[Any]


class Checks:
    """Rows of a benchmark: a table for people on standard error, one JSON line for machines at the end."""

    def __init__(self, bench: str) -> None:
        self._bench = bench
        self._rows: list[dict[str, object]] = []

    def at_most(self, name: str, value: float, bound: float) -> None:
        """A value that should not be larger than a bound."""
        self.add(name, value, f"<= {bound:g}", holds=value <= bound)

    def at_least(self, name: str, value: float, bound: float) -> None:
        """A value that should not be smaller than a bound."""
        self.add(name, value, f">= {bound:g}", holds=value >= bound)

    def report(self, name: str, value: float) -> None:
        """A value without a goal."""
        self.add(name, value, "reported", holds=True)

    def add(self, name: str, value: float | None, goal: str, *, holds: bool) -> None:
        """One row."""
        shown = None if value is None else float(f"{value:.4g}")
        self._rows.append({"name": name, "value": shown, "goal": goal, "holds": holds})
        print(f"{'ok  ' if holds else 'MISS'} {name:<58} {shown!s:>10}  {goal}", file=sys.stderr, flush=True)

    def print(self) -> None:
        """The JSON line."""
        print(json.dumps({"bench": self._bench, "checks": self._rows}, ensure_ascii=False), flush=True)


def write_mlp(path: Path, width: int, layers: int) -> TensorSpec:
    """A net of square matrices: width² · layers weights. Returns its input."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for layer in range(layers):
        value = (rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
        weights.append(numpy_helper.from_array(value, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"x{layer}" if layer else "x", f"w{layer}"], [f"m{layer}"]))
        last = layer == layers - 1
        nodes.append(helper.make_node("Relu", [f"m{layer}"], ["y" if last else f"x{layer + 1}"]))
    shape: list[int | str] = ["batch", width]
    _save(path, nodes, weights, shape, shape)
    return TensorSpec("x", "float32", (-1, width))


def write_conv(path: Path, *, side: int, channels: int, layers: int) -> TensorSpec:
    """A convolutional net on (rows, 3, side, side) images with 10 answers. Returns its input."""
    rng = np.random.default_rng(0)
    nodes, weights, before, count = [], [], "x", 3
    for layer in range(layers):
        value = (rng.standard_normal((channels, count, 3, 3)) / np.sqrt(count * 9)).astype(np.float32)
        weights.append(numpy_helper.from_array(value, f"w{layer}"))
        stride = [2, 2] if layer == 0 else [1, 1]
        nodes.append(helper.make_node("Conv", [before, f"w{layer}"], [f"c{layer}"], strides=stride, pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        before, count = f"r{layer}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [before], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    weights.append(numpy_helper.from_array(rng.standard_normal((channels, 10)).astype(np.float32), "last"))
    nodes.append(helper.make_node("MatMul", ["flat", "last"], ["y"]))
    _save(path, nodes, weights, ["batch", 3, side, side], ["batch", 10])
    return TensorSpec("x", "float32", (-1, 3, side, side))


def _save(path: Path, nodes: list[Any], weights: list[Any], taken: list[int | str], given: list[int | str]) -> None:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, taken)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, given)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))


def manifest(name: str, spec: TensorSpec, *, max_batch: int) -> Manifest:
    """A manifest for a net above."""
    output = TensorSpec("y", "float32", (-1, 10 if len(spec.shape) == 4 else spec.shape[1]))
    return Manifest(
        "a" * 64, 1, 1, name, "1", "v", "p", ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32, (spec,), (output,),
        max_batch=max_batch,
    )  # fmt: skip


@contextmanager
def worker(nets: dict[Path, Manifest], unix_socket: Path) -> Iterator[tuple[str, int]]:
    """The agent's own inference worker, serving these nets; its TCP address."""
    with told_worker(nets, unix_socket) as (_, address):
        yield address


@contextmanager
def told_worker(nets: dict[Path, Manifest], unix_socket: Path) -> Iterator[tuple[FrameChannel, tuple[str, int]]]:
    """The same, and the channel by which it is told what to do."""
    started = start_worker(str(unix_socket), forked=False)
    channel = started.channel
    try:
        for path, net in nets.items():
            serve(channel, net, path)
        yield channel, started.address
    finally:
        channel.close()
        started.process.wait(30)


def oip_request(model: str, row: Array) -> bytes:
    """A whole HTTP request of the Open Inference Protocol with binary tensors both ways."""
    blob = row.tobytes()
    head = {
        "inputs": [
            {
                "name": "x",
                "datatype": "FP32",
                "shape": list(row.shape),
                "parameters": {"binary_data_size": len(blob)},
            }
        ],
        "parameters": {"binary_data_output": True},
    }
    header = json.dumps(head).encode()
    size = len(header) + len(blob)
    return (
        (
            f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n"
            f"Inference-Header-Content-Length: {len(header)}\r\n\r\n"
        ).encode()
        + header
        + blob
    )


@dataclass
class _Client:
    sock: socket.socket
    unsent: memoryview
    got: bytearray
    started: float
    events: int = selectors.EVENT_READ


def closed_loop(address: tuple[str, int] | str, request: bytes, *, clients: int, seconds: float) -> list[float]:
    """Seconds of each answer, from `clients` connections that each ask again as soon as they are answered.

    One process of its own, with one selector where there are several: cheap, so that what is measured is the server.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_drive, args=(address, request, clients, seconds, sender))
    process.start()
    times: list[float] = receiver.recv()
    process.join()
    return times


def _drive(address: tuple[str, int] | str, request: bytes, clients: int, seconds: float, sender: Any) -> None:
    socks = [_connect(address) for _ in range(clients)]
    sender.send(_ask_alone(socks[0], request, seconds) if clients == 1 else _ask_together(socks, request, seconds))


def _connect(address: tuple[str, int] | str) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.connect(address)
    if family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _ask_alone(sock: socket.socket, request: bytes, seconds: float) -> list[float]:
    """As a program does that has one connection: it waits in the call that sends, and in that which receives."""
    times: list[float] = []
    got = bytearray()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        sock.sendall(request)
        got.clear()
        while not _whole(got):
            got += sock.recv(1 << 16)
        times.append(time.perf_counter() - started)
    return times


def _ask_together(socks: list[socket.socket], request: bytes, seconds: float) -> list[float]:
    selector = selectors.DefaultSelector()
    for sock in socks:
        sock.setblocking(False)
        client = _Client(sock, memoryview(request), bytearray(), time.perf_counter())
        selector.register(sock, selectors.EVENT_READ, client)
        _push(selector, client)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for key, _ in selector.select(1.0):
            client = key.data
            if client.unsent:
                _push(selector, client)
                continue
            client.got += client.sock.recv(1 << 16)
            if _whole(client.got):
                times.append(time.perf_counter() - client.started)
                client.got.clear()
                client.unsent, client.started = memoryview(request), time.perf_counter()
                _push(selector, client)
    return times


def _push(selector: selectors.BaseSelector, client: _Client) -> None:
    """Send what the socket takes; what it is looked at for changes only where that is not all, which costs a call."""
    with suppress(BlockingIOError):
        client.unsent = client.unsent[client.sock.send(client.unsent) :]
    events = selectors.EVENT_WRITE if client.unsent else selectors.EVENT_READ
    if events != client.events:
        client.events = events
        selector.modify(client.sock, events, client)


def _whole(answer: bytearray) -> bool:
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    head = bytes(answer[:end]).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(bytes(answer[:500]).decode(errors="replace"))
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return len(answer) >= end + 4 + length


def ask_once(address: tuple[str, int], request: bytes) -> bool:
    """One request on a connection of its own: whether it was answered with 200."""
    with suppress(OSError), socket.create_connection(address, 10) as sock:
        sock.sendall(request)
        return sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
    return False


def quantile(times: list[float], share: float) -> float:
    """In milliseconds."""
    return float(np.quantile(times, share) * 1000)


@contextmanager
def broker(folder: Path) -> Iterator[tuple[int, int]]:
    """Mosquitto on loopback with the limits of the embedded one, counting what is published; its port and pid."""
    port, configuration = free_port(), folder / "mosquitto.conf"
    configuration.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nmax_inflight_messages 200\n"
        "max_queued_messages 100000\nmax_packet_size 2097152\nsys_interval 1\nlog_type error\n"
    )
    executable, environment = find_mosquitto("mosquitto")
    process = subprocess.Popen([executable, "-c", str(configuration)], env={**os.environ, **environment})
    try:
        await_port(port, process)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(10)


def await_port(port: int, process: subprocess.Popen[Any], seconds: float = 20.0) -> None:
    """Return when the process accepts connections on its port of loopback."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.02)
    raise RuntimeError(f"nothing listens on port {port}")


def children(pid: int) -> list[int]:
    """Processes that a process has started and that are still there."""
    return [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]


def pss_mb(pid: int) -> float:
    """Proportional set size: shared pages count in part, so that the figures of several processes add up."""
    return _memory_mb(pid, "Pss:")


def own_mb(pid: int) -> float:
    """What a process has written itself; of files that are mapped, as libraries are, nothing."""
    return _memory_mb(pid, "Pss_Anon:")


def _memory_mb(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def cpu_s(pid: int) -> float:
    """Processor time of a process's living threads; to the nanosecond, where clock ticks would be too coarse."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
