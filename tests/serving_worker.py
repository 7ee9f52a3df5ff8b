"""A real inference worker for tests of the local inference API, and models that take every kind of tensor."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from agent.head_start import MEMORY_SETTINGS, QUIET_SETTINGS, WORKER
from agent.listeners import Listeners
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.serving.framing import FrameChannel, lend
from agent.serving.ipc import Activate, Activated, Expect, FromWorker, GrpcServed, Lend, Load, Loaded, Ready
from tests.worker_forge import ForgedWorker

KINDS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "string": TensorProto.STRING,
}


@dataclass(frozen=True)
class ServingWorker:
    """One without a supervisor: it is told what to do by whoever started it. It takes requests already."""

    process: subprocess.Popen[bytes] | ForgedWorker
    channel: FrameChannel
    url: str
    grpc: GrpcServed | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)


def start_worker(
    unix_socket: str = "",
    environment: Mapping[str, str] | None = None,
    *,
    python: Path | None = None,
    folder: Path | None = None,
    grpc: Sequence[str] = (),
    for_peers: str = "",
    forked: bool = True,
) -> ServingWorker:
    """Start one on a port of its own; its streams end when the channel is closed, and so does it.

    Args:
        unix_socket: path of a Unix socket; empty for none.
        environment: added to this process's.
        python: interpreter; None for this one.
        folder: that it works in; None for this one.
        grpc: addresses to serve gRPC at.
        for_peers: `host:port` where peers of the LAN may connect; empty for nowhere.
        forked: where none of these is given, it need not import what another has; its memory is not all its own then.
    """
    ours, theirs = socket.socketpair()
    peers = Listeners(for_peers, "").open() if for_peers else []
    listeners = Listeners("127.0.0.1:0", unix_socket).open() + peers
    variables = {**MEMORY_SETTINGS, **QUIET_SETTINGS, **os.environ}
    variables.pop("PYTEST_CURRENT_TEST", None)
    process: subprocess.Popen[bytes] | ForgedWorker
    if not forked or environment or python or folder or grpc or for_peers:
        command = [str(python or sys.executable), "-c", WORKER, "--fd", str(theirs.fileno())]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env={**variables, **(environment or {})}, cwd=folder
        )
    else:
        process = ForgedWorker(theirs, variables)
    lend(ours, Lend(tuple(grpc), for_peers=len(peers)), listeners)
    for one in (theirs, *listeners):
        one.close()
    channel = FrameChannel(ours, FromWorker)
    ready = channel.receive()
    assert isinstance(ready, Ready)
    channel.send(Expect(()))
    served = channel.receive() if grpc else None
    assert served is None or isinstance(served, GrpcServed)
    return ServingWorker(process, channel, ready.url, served)


@contextmanager
def running_worker(
    unix_socket: Path | None = None,
) -> Iterator[tuple[FrameChannel, str, subprocess.Popen[bytes] | ForgedWorker]]:
    """A worker with nothing loaded: its channel, its `host:port`, and its process. It must end well."""
    started = start_worker("" if unix_socket is None else str(unix_socket))
    try:
        yield started.channel, started.url.removeprefix("http://"), started.process
    finally:
        started.channel.close()
        assert started.process.wait(20) == 0


def serve(
    channel: FrameChannel, manifest: Manifest, path: Path, *, activate: bool = True, deployment: str = "deployment"
) -> Loaded:
    """Load an artifact and let it answer; what the worker said to the load."""
    channel.send(Load(1, deployment, manifest, str(path)))
    loaded = channel.receive()
    assert isinstance(loaded, Loaded)
    assert loaded.code is None, loaded.detail
    if activate:
        channel.send(Activate(2, manifest.model, manifest.digest))
        assert channel.receive() == Activated(2, ok=True)
    return loaded


def described(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], **more: object) -> Manifest:
    """A manifest for an ONNX file."""
    values: dict[str, object] = {"digest": "a" * 64, "version": "1", "max_batch": 8, **more}
    return Manifest(
        size=10, chunk_size=4, model=name, variant_id="v", profile="p", format=ModelFormat.ONNX,
        runtime=RuntimeName.ONNX, precision=Precision.FP32, inputs=inputs, outputs=outputs, **values,  # type: ignore[arg-type]
    )  # fmt: skip


def write_echo(path: Path, dtype: str, width: int | None = None) -> Manifest:
    """A model `echo-{dtype}` that answers what it is given; its manifest. Without a width rows may have any."""
    size = -1 if width is None else width
    write(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", KINDS[dtype], ["rows", width or "width"])],
        [helper.make_tensor_value_info("y", KINDS[dtype], ["rows", width or "width"])],
    )
    return described(f"echo-{dtype}", (TensorSpec("x", dtype, (-1, size)),), (TensorSpec("y", dtype, (-1, size)),))


def write_sums(path: Path) -> Manifest:
    """A model `sums` of two inputs and two outputs: their sum and their difference."""
    value = helper.make_tensor_value_info
    write(
        path,
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])],
        [value(name, TensorProto.FLOAT, ["rows", 2]) for name in ("a", "b")],
        [value(name, TensorProto.FLOAT, ["rows", 2]) for name in ("sum", "difference")],
    )
    sides = [tuple(TensorSpec(name, "float32", (-1, 2)) for name in names) for names in ("ab", ("sum", "difference"))]
    return described("sums", sides[0], sides[1])


def write(path: Path, nodes: list[onnx.NodeProto], inputs: list[object], outputs: list[object]) -> None:
    """An ONNX file."""
    model = helper.make_model(
        helper.make_graph(nodes, "net", inputs, outputs),  # type: ignore[arg-type]
        opset_imports=[helper.make_opsetid("", 17)],
    )
    model.ir_version = 9
    onnx.save(model, str(path))
