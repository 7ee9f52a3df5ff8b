"""Every decoder of bytes from outside, each as a function that takes any bytes and lets only its own error escape.

`test_targets.py` runs them for a moment in CI, `python -m tests.fuzz` for as long as one likes, led by coverage.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import http.client
import io
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from agent.keys import new_key, signing_request
from agent.peers.request import BadRequestError as PeerRefusal
from agent.peers.request import parse as parse_peer_request
from agent.pipelines.frames import FrameError, FrameReader
from agent.processing.decode import decode as decode_image
from agent.processing.image import ImageError, to_row
from agent.protocol import processing_rules
from agent.protocol.bundle import read_index, read_order
from agent.protocol.codec import Message, decode, encode
from agent.protocol.commands import (
    Command,
    CommandAnswer,
    CommandArguments,
    CommandPhase,
    CommandResult,
    LogLine,
    ModelBenchmark,
)
from agent.protocol.delta import ADD, COPY, DELTA, LITERAL, SPARSE
from agent.protocol.errors import WireError
from agent.protocol.facts import AcceleratorFacts, DeviceFacts, RuntimeFacts
from agent.protocol.lifecycle import Phase
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest, TensorSpec, manifest_bytes
from agent.protocol.messages import (
    Certificate,
    ChunkRange,
    DeploymentReport,
    HostWindow,
    ModelWindow,
    Need,
    Presence,
    Problem,
    Renew,
    Reported,
    ServingReport,
    SourceNeed,
    SourceOffer,
    TelemetryAck,
    TelemetryBatch,
    TensorSketch,
    TrialPhase,
    TrialReport,
    TrialResult,
    TrustNeed,
    TrustPiece,
)
from agent.protocol.processing import ImageStep, Processing
from agent.protocol.topics import parse_chunk_topic, parse_device_topic, repair_topic
from agent.protocol.version import SPOKEN
from agent.runtimes.base import Tensors
from agent.serving.bad_request import BadRequestError
from agent.serving.connection import Connection, _Elsewhere
from agent.serving.exchange import Request
from agent.serving.http import Api
from agent.serving.models import LoadedModel
from agent.serving.oip import decode_request
from agent.serving.registry import Registry
from agent.trial import golden
from agent.trial.dataset import DataSetError, read_checked
from agent.update.bundle_file import BundleError, open_bundle, read_chunks
from agent.update.delta import DecodeError
from agent.update.http_source import HttpAnswer
from agent.update.store import ArtifactStore
from agent.update.transfer import SourceError, Stop
from agent.update.trust import FIRST_ROOT, PieceFetcher, TrustClient, TrustError, UnavailableError
from fleet_server.errors import InvalidError, UnauthorizedError
from fleet_server.trust.ca import FleetCa, read_request
from fleet_server.trust.tickets import TicketDesk
from tests.delta_files import decoded, frame, operation
from tests.tuf_repository import TufRepository
from tests.unit.agent import test_bundles as bundles
from tests.unit.agent.test_serving_models import Doubling, manifest
from tests.unit.agent.test_updater import desired

D = "a" * 64
FACTS = DeviceFacts(
    "0.1.0", "Debian", "6.1", "x86_64", "a CPU", 4, ("avx2",), 1024, 9000,
    (AcceleratorFacts("cuda", "Orin", "8.7"),), (RuntimeFacts("onnx", "onnxruntime", "1.31.0", ("cpu",)),),
    {"site": "plant7"},
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One decoder: what runs it, what it takes gladly, and its share of a long run (what is slow gets less)."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    share: float = 1.0


def _message(*examples: Message) -> Target:
    kind: Any = type(examples[0])

    def run(payload: bytes) -> None:
        with contextlib.suppress(WireError):
            message = decode(payload, kind)
            decode(encode(message), kind)  # what was read can be said again

    return Target(run, tuple(encode(one) for one in examples))


def _topic(payload: bytes) -> None:
    text = payload.decode("utf-8", errors="replace")
    for parse in (parse_device_topic, parse_chunk_topic):
        with contextlib.suppress(WireError):
            parse(text)


_MODEL: Manifest = manifest(-1, 8)
_HEADER = b'{"id": "r", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}'
_BINARY = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}}]}'


def _infer(payload: bytes) -> None:
    """The first byte says how long the header is: a client says that in a header of its own."""
    length = None if not payload or payload[0] > 250 else payload[0]
    with contextlib.suppress(BadRequestError):
        found = decode_request(payload[1:], length, _MODEL)
        assert found.inputs["x"].dtype == np.float32


class _Transport:
    """Takes what a connection writes, and notes whether it was closed."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass


class _Quiet(Connection):
    """A connection of which only the reading is tried; requests it has read are answered in `_http`."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport


class _Echo(Doubling):
    """A runtime that gives back what it gets."""

    def run(self, inputs: Tensors) -> Tensors:
        return {"y": inputs["x"]}


@cache
def _served() -> tuple[asyncio.AbstractEventLoop, Api, LoadedModel]:
    """The routes with a model that gives back its input, and the loop that they run in."""
    registry = Registry()
    model = LoadedModel(_MODEL, "d", _Echo())
    registry.add(model)
    registry.activate(_MODEL.model, _MODEL.digest)
    return asyncio.new_event_loop(), Api(registry), model


def _arrive(connection: Connection, content: bytes) -> None:
    """Bytes come, as an event loop would have them read: as many at a time as there is room for."""
    while content:
        room = connection.get_buffer(-1)
        came = content[: len(room)]
        room[: len(came)] = came
        connection.buffer_updated(len(came))
        content = content[len(came) :]


async def _read_and_answered(api: Api, payload: bytes) -> None:
    connection = _Quiet(api)
    transport = _Transport()
    connection.connection_made(transport)
    half = len(payload) // 2
    _arrive(connection, payload[:half])
    _arrive(connection, payload[half:])
    connection.connection_lost(None)
    while (came := connection._waiting.get_nowait()) is not None:
        if isinstance(came, _Elsewhere):
            await came.over.wait()
            if came.request is None:
                continue
            came = came.request
        answer = await connection._answer(came) if isinstance(came, Request) else came
        assert answer.status != 500, answer.body
    while connection._soon:  # noqa: ASYNC110 (nobody tells of that)
        await asyncio.sleep(0)
    assert b"HTTP/1.1 500" not in transport.written, bytes(transport.written)
    connection._incoming.release()


def _http(payload: bytes) -> None:
    """Whatever comes, no answer is a failure of the server's own."""
    loop, api, model = _served()
    loop.run_until_complete(_read_and_answered(api, payload))
    window = model.recorder.collect()
    decode(
        encode(msgspec.structs.replace(_BATCH, models=(window,))), TelemetryBatch
    )  # the server takes what was counted


def _npz(**arrays: Any) -> bytes:
    kept = io.BytesIO()
    np.savez_compressed(kept, **arrays)
    return kept.getvalue()


def _data_set(payload: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        file.write(payload)
        file.flush()
        with contextlib.suppress(DataSetError):
            read_checked(Path(file.name), _MODEL.inputs)


_STEP = ImageStep(size=(8, 8))
_IMAGE_INPUT = (TensorSpec("image", "float32", (-1, 3, 8, 8)),)


def _image_file(kind: str, **more: Any) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((9, 6)).convert("RGB").save(file, kind, **more)
    return file.getvalue()


def _image(payload: bytes) -> None:
    with contextlib.suppress(ImageError):
        row, _ = to_row(decode_image(payload), _STEP, "float32")
        assert row.shape == (1, 3, 8, 8)


def _image_set(payload: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        file.write(payload)
        file.flush()
        with contextlib.suppress(DataSetError):
            read_checked(Path(file.name), _IMAGE_INPUT, Processing(_STEP))


_DETECTION = (
    b'{"image": {"size": [8, 8]}, "answer": {"kind": "detection", "boxes": {"output": "y"}, '
    b'"scores": {"output": "y", "columns": [0, 1]}}}'
)


def _processing(payload: bytes) -> None:
    with contextlib.suppress(
        processing_rules.ProcessingError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError
    ):
        declared = processing_rules.read(msgspec.json.decode(payload))
        processing_rules.check(declared, _IMAGE_INPUT, _MODEL.outputs)


def _golden(payload: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(payload)
        file.flush()
        with contextlib.suppress(golden.GoldenError):
            golden.read(Path(file.name), _MODEL)


def _chunks(payload: bytes) -> None:
    """A download that gets anything in any order keeps nothing but what has the digest."""
    folder = Path(tempfile.mkdtemp())
    try:
        store = ArtifactStore(folder)
        content = msgspec.structs.replace(_MODEL, digest=D, size=64, chunk_size=16)
        part = store.open_part(content)
        for start in range(0, len(payload), 17):
            part.write(payload[start] % 8 - 2, payload[start + 1 : start + 17])
        if part.missing == 0:
            assert not part.finish()
        part.close()
        assert not store.has(D)
    finally:
        shutil.rmtree(folder)


_FILES = ("timestamp.json", "2.snapshot.json", "2.targets.json", "2.model.m.json", "2.root.json")
_STATES = (desired(3, ("one", "a" * 64), ("two", "b" * 64)), desired(4))
_REPORT = Reported(
    SPOKEN, "boot", 3, 2, FACTS,
    (DeploymentReport("one", "m", "1", D, Phase.DOWNLOADING, 100, 2),),
    (ServingReport("m", "1", D, "one", "onnxruntime 1", "cpu", 0.1),),
    1.0,
    (TrialReport("t", TrialPhase.DONE, (TrialResult(D, "onnxruntime 1", "cpu", accuracy=0.5),)),),
    (D,),
    (Problem("disk_full", "the disk is full", 1.0, 2.0, ongoing=True),),
)  # fmt: skip
_BATCH = TelemetryBatch(
    SPOKEN, "spool", 1, 0.0, 1.0, (ModelWindow("m", "1", D, "one", "cpu", 3, latency={4: 3}, confusion=((1, 2, 3),),
    confidence={3: 1}, predicted={1: 3}, inputs={"x": TensorSketch({5: 3}, {0: 3})}, crashes=1),),
    HostWindow(cpu_percent=1.0),
)  # fmt: skip
_RAW = bytes.fromhex("0000803f00000040")


def _post(path: str, body: bytes, header: int) -> bytes:
    lengths = f"Inference-Header-Content-Length: {header}\r\nContent-Length: {len(body)}"
    return f"POST /v2/models/m/{path} HTTP/1.1\r\nHost: d\r\n{lengths}\r\n\r\n".encode() + body


_ASKED = (
    _post("infer", _BINARY + _RAW, len(_BINARY)),
    _post("infer", _HEADER, len(_HEADER)),
    _post("feedback", b'{"labels": [{"id": "r", "label": 1}]}', 0),
    b"GET /v2/models/m HTTP/1.1\r\nHost: d\r\n\r\n" * 2,
)


def _delta(payload: bytes) -> None:
    """The first byte says whether what follows is a frame, or what a frame holds."""
    content = frame(payload[1:]) if payload[:1] == b"\0" else payload[1:]
    with contextlib.suppress(DecodeError):
        decoded(DELTA, content, _DELTA_BASE, 2000)


_DELTA_BASE = bytes(range(250)) * 8
_OPERATIONS = (
    operation(COPY, 100, skip=9)
    + operation(ADD, 400, bytes(400), width=4)
    + operation(SPARSE, 1000, b"\3\xff\5\1\1\2\0\0", width=2, changes=2, gaps=3)
    + operation(LITERAL, 500, bytes(500), width=4)
)


def _signing_request(payload: bytes) -> None:
    with contextlib.suppress(InvalidError):
        read_request(payload.decode("latin-1"))


def _bundle(payload: bytes) -> None:
    """Whatever is on a stick: what is read of it lies inside the file, and is no more than was asked for."""
    with tempfile.NamedTemporaryFile(suffix=".shoal-bundle") as file:
        file.write(payload)
        file.flush()
        try:
            found = open_bundle(Path(file.name))
        except BundleError:
            return
        for name in found.metadata:
            found.piece(name, 0)
        for one in found.index.read_manifests():
            with contextlib.suppress(SourceError):
                spans = (ChunkRange(0, min(one.chunks, 8) - 1),)
                assert all(len(piece) <= one.chunk_size for _, piece in read_chunks(found, one, spans, Stop()))


def _bundle_index(payload: bytes) -> None:
    for read in (read_index, read_order):
        with contextlib.suppress(WireError):
            read(payload)


def _peer_request(payload: bytes) -> None:
    with contextlib.suppress(PeerRefusal):
        assert len(parse_peer_request(payload).digest) == 64


class _Said:
    """A socket of which only what the other side said is there."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._payload)

    def close(self) -> None:
        pass


def _http_answer(payload: bytes) -> None:
    """An answer to a request for chunks: never more than they have."""
    said: Any = _Said(payload)
    response = http.client.HTTPResponse(said)
    content = msgspec.structs.replace(_MODEL, digest=D, size=64, chunk_size=16)
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, SourceError):
        response.begin()
        if response.status in {200, 206}:
            found = dict(HttpAnswer(said, response, content, ChunkRange(1, 2)).chunks())
            assert all(len(piece) == 16 for piece in found.values())
            assert set(found) <= set(range(4))


def _frames(payload: bytes) -> None:
    """Cut in two, as a pipe may."""
    reader = FrameReader(1000)
    with contextlib.suppress(FrameError):
        for piece in (payload[: len(payload) // 2], payload[len(payload) // 2 :]):
            assert all(0 < len(frame) <= 1000 for frame in reader.feed(piece))


@cache
def _desk() -> TicketDesk:
    folder = Path(tempfile.mkdtemp(prefix="shoal-fuzz-"))
    atexit.register(shutil.rmtree, folder)
    return TicketDesk(FleetCa.open(folder, "f"))


def _ticket(payload: bytes) -> None:
    with contextlib.suppress(UnauthorizedError):
        assert _desk().read(payload.decode("latin-1"), D, 0.0).digest == D


@cache
def _repository() -> TufRepository:
    found = TufRepository()
    found.add("model.m", _MODEL.target_path, manifest_bytes(_MODEL))
    return found


@cache
def _trusting() -> Path:
    """A device's folder that trusts the repository's root and nothing else yet."""
    folder = Path(tempfile.mkdtemp(prefix="shoal-fuzz-"))
    atexit.register(shutil.rmtree, folder)
    (folder / FIRST_ROOT).write_bytes(_repository().files["1.root.json"])
    return folder


def _trusted(file: str) -> Target:
    """A device that is sent other bytes for one metadata file: it never trusts a manifest that was not signed."""
    honest = _repository()

    def run(payload: bytes) -> None:
        folder = Path(shutil.copytree(_trusting(), tempfile.mkdtemp(), dirs_exist_ok=True))
        files = {**honest.files, file: payload}

        def ask(name: str, offset: int) -> TrustPiece:
            body = files.get(name)
            if not body:
                return TrustPiece(name, offset, absent=True)
            return TrustPiece(name, offset, len(body), body[offset : offset + LIMITS.trust_piece_bytes])

        try:
            client = TrustClient(folder, None, PieceFetcher(ask), first_use=False)
            client.refresh()
            client.check(_MODEL.target_path, b"another manifest")
            raise AssertionError("a manifest that nobody signed was trusted")
        except (TrustError, UnavailableError):
            pass
        finally:
            shutil.rmtree(folder)

    return Target(run, (honest.files.get(file, honest.files["1.root.json"]),), share=0.02)


def _csr() -> bytes:
    return signing_request(new_key(), "camera-01").encode()


_GOLDEN = {
    **{f"0/in/{one.name}": np.zeros((1, 2), np.float32) for one in _MODEL.inputs},
    **{f"0/out/{one.name}": np.zeros(2, np.float32) for one in _MODEL.outputs},
    **{f"0/shape/{one.name}": np.array([1, 2]) for one in _MODEL.outputs},
    "tolerances": np.full(len(_MODEL.outputs), 0.1),
}
TARGETS: dict[str, Target] = {
    "desired": _message(*_STATES),
    "reported": _message(_REPORT),
    "presence": _message(Presence(online=True, boot_id="b")),
    "need": _message(Need(D, "one", (ChunkRange(0, 3), ChunkRange(5, 9)), 32)),
    "telemetry": _message(_BATCH),
    "telemetry-ack": _message(TelemetryAck("spool", (1, 2))),
    "command": _message(Command("c", "logs", 60.0, 1e9, CommandArguments(5, True, "ERROR", ("m",), 2.0))),
    "command-answer": _message(
        CommandAnswer("c", CommandPhase.RUNNING, lines=(LogLine(1, 1.0, "INFO", "agent", "a", "x"),), dropped=3),
        CommandAnswer("c", CommandPhase.FAILED, "c", "d", CommandResult(("m",), 1.0, (ModelBenchmark("m", "1"),))),
    ),
    "topic": Target(_topic, (repair_topic("camera-01", D, 3).encode(), b"shoal/v1/12/d/camera-01/need")),
    "infer": Target(_infer, (b"\xff" + _HEADER, bytes([len(_BINARY)]) + _BINARY + _RAW)),
    "http": Target(_http, _ASKED),
    "data-set": Target(_data_set, (_npz(x=np.zeros((3, 2), np.float32), y=np.arange(3)),), share=0.2),
    "image": Target(
        _image,
        (
            _image_file("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
            *(_image_file(kind) for kind in ("PNG", "WEBP", "BMP")),
        ),
        share=0.5,
    ),
    "image-set": Target(
        _image_set,
        (
            _npz(image_pixels=np.zeros((2, 4, 5, 3), np.uint8)),
            _npz(
                image_bytes=np.frombuffer(_image_file("PNG"), np.uint8), image_sizes=np.array([len(_image_file("PNG"))])
            ),
        ),
        share=0.2,
    ),
    "processing": Target(
        _processing,
        (
            b'{"image": {"size": [8, 8], "mean": [0.5]}, "answer": {"kind": "classification"}}',
            _DETECTION,
        ),
    ),
    "golden": Target(_golden, (_npz(**_GOLDEN),), share=0.2),
    "renew": _message(Renew(SPOKEN, "-----BEGIN CERTIFICATE REQUEST-----", b"signature")),
    "certificate": _message(Certificate(D, "-----BEGIN CERTIFICATE-----", "", 1.0, 2.0)),
    "trust-need": _message(TrustNeed("timestamp.json", 0)),
    "trust-piece": _message(TrustPiece("3.root.json", 0, 3, b"{}\n")),
    "delta": Target(_delta, (b"\0" + _OPERATIONS, b"\1" + frame(_OPERATIONS))),
    "signing-request": Target(_signing_request, (_csr(),)),
    **{f"tuf-{file}": _trusted(file) for file in _FILES},
    "source-need": _message(SourceNeed(D)),
    "source-offer": _message(SourceOffer(D, "https://fleet.example/a", "ticket", 900.0), SourceOffer(D)),
    "bundle": Target(_bundle, (bundles.bundle(),), share=0.1),
    "bundle-index": Target(_bundle_index, (msgspec.json.encode(bundles.index()), bytes(bundles.index().order))),
    "peer-request": Target(
        _peer_request, (f"GET /shoal/v1/artifacts/{D} HTTP/1.1\r\nRange: bytes=0-9\r\n\r\n".encode(),)
    ),
    "http-answer": Target(
        _http_answer,
        (
            b"HTTP/1.1 206 P\r\nContent-Range: bytes 16-47/64\r\nContent-Length: 32\r\n\r\n" + bytes(32),
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n" + bytes(64) + b"\r\n0\r\n\r\n",
        ),
    ),
    "frames": Target(
        _frames, (b"--ffmpeg\r\nContent-type: image/jpeg\r\nContent-length: 3\r\n\r\nabc\r\n--ffmpeg\r\n",)
    ),
    "ticket": Target(_ticket, (_desk().issue("camera-01", D, 5, 0.0).encode(),)),
    "chunks": Target(_chunks, (bytes(range(68)), b"\2" + b"x" * 16), share=0.2),
}
