"""Whatever the bytes, a decoder answers with a message or with its own error, and reads no more than its bounds."""

from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol.codec import decode, encode
from agent.protocol.commands import Command, CommandAnswer
from agent.protocol.errors import WireError, WireErrorCode
from agent.protocol.limits import LIMITS
from agent.protocol.messages import (
    Certificate,
    ChunkRange,
    DesiredState,
    ModelWindow,
    Need,
    Presence,
    Renew,
    Reported,
    TelemetryAck,
    TelemetryBatch,
    TensorSketch,
    TrustNeed,
    TrustPiece,
)
from agent.protocol.topics import parse_chunk_topic, parse_device_topic
from agent.serving.bad_request import BadRequestError
from agent.serving.oip import decode_request
from agent.trial.dataset import DataSetError, read_checked
from tests.fuzz.targets import TARGETS
from tests.unit.agent.test_journal_and_spool import batch
from tests.unit.agent.test_serving_models import manifest
from tests.unit.agent.test_updater import desired

KINDS: tuple[Any, ...] = (
    DesiredState,
    Reported,
    Presence,
    Need,
    TelemetryBatch,
    TelemetryAck,
    Renew,
    Certificate,
    TrustNeed,
    TrustPiece,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(KINDS), payload=st.binary(max_size=300) | VALUES.map(msgspec.msgpack.encode))
def test_bytes_of_nobody(kind: Any, payload: bytes) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(decode(payload, kind), kind)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_messages_with_a_field_changed(data: st.DataObject) -> None:
    original = json.loads(encode(desired(3, ("one", "a"), ("two", "b"))))
    place: Any = original
    while isinstance(place, (dict, list)) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if data.draw(st.booleans()) or not isinstance(place[key], (dict, list)) or not place[key]:
            place[key] = data.draw(VALUES)
            break
        place = place[key]
    with contextlib.suppress(WireError):
        assert len(decode(msgspec.json.encode(original), DesiredState).deployments) <= LIMITS.deployments


@pytest.mark.parametrize("kind", [DesiredState, Reported, Presence, Need, Renew, Certificate, Command, CommandAnswer])
def test_depth_and_size_are_bounded(kind: Any) -> None:
    with pytest.raises(WireError):
        decode(b"[" * 200_000, kind)
    with pytest.raises(WireError) as found:
        decode(b" " * (LIMITS.message_bytes + 1), kind)
    assert found.value.code is WireErrorCode.TOO_LARGE


def test_counts_are_bounded() -> None:
    spans = tuple(ChunkRange(2 * i, 2 * i) for i in range(LIMITS.missing_ranges + 1))
    with pytest.raises(WireError, match="missing"):
        decode(encode(Need("a" * 64, "d", spans, 32)), Need)
    with pytest.raises(WireError, match="impossible range"):
        decode(encode(Need("a" * 64, "d", (ChunkRange(5, 3),), 32)), Need)
    window = ModelWindow("d", "m", "1", "a" * 64, "cpu", -1, 0, 0, 0, {}, ())
    whole = msgspec.structs.replace(batch("s", 1), models=(window,))
    with pytest.raises(WireError, match="negative"):
        decode(encode(whole), TelemetryBatch)


WIDE = TensorSketch(dict.fromkeys(range(LIMITS.sketch_cells + 1), 1))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"confidence": {32: 1}}, "confidence"),
        ({"confidence": {-2: 1}}, "confidence"),
        ({"confidence": {0: -1}}, "confidence"),
        ({"predicted": {-2: 1}}, "predicted"),
        ({"predicted": dict.fromkeys(range(LIMITS.predicted_classes + 1), 1)}, "predicted"),
        ({"inputs": {"x": TensorSketch({1026: 1})}}, "inputs"),
        ({"inputs": {"x": TensorSketch({}, {-1025: 1})}}, "inputs"),
        ({"inputs": {"x": WIDE}}, "inputs"),
        ({"inputs": {"\0": TensorSketch()}}, "inputs"),
        ({"outputs": {"y" * 200: TensorSketch()}}, "outputs"),
        ({"outputs": {str(number): TensorSketch() for number in range(17)}}, "outputs"),
        ({"crashes": -1}, "crashes"),
    ],
)
def test_signals_beyond_their_bounds_are_refused(fields: dict[str, Any], said: str) -> None:
    window = ModelWindow("m", "1", "a" * 64, "d", "cpu", **fields)
    with pytest.raises(WireError, match=said):
        decode(encode(msgspec.structs.replace(batch("s", 1), models=(window,))), TelemetryBatch)


BOUND = "a" * 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"revision": -1}, "revision"),
        ({"revision": 2**70}, "revision"),
        ({"telemetry_interval_s": 1e-9}, "telemetry_interval_s"),
        ({"telemetry_interval_s": 1e300}, "telemetry_interval_s"),
        ({"probation_s": -1}, "probation_s"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"probation": {"seconds": -1}}, "probation"),
        ({"probation": {"error_share": 1.5}}, "error_share"),
        ({"probation": {"minimum_requests": -1}}, "minimum_requests"),
        ({"probation": {"memory_mb": 1e300}}, "probation"),
        ({"golden": {"digest": "x", "size": 1, "chunk_size": 1}}, "golden.digest"),
        ({"golden": {"digest": BOUND, "size": LIMITS.golden_bytes + 1, "chunk_size": 1}}, "golden.size"),
        ({"golden": {"digest": BOUND, "size": 1, "chunk_size": 0}}, "golden.chunk_size"),
        ({"scheduling": {"queue_limit": 0}}, "scheduling.queue_limit"),
        ({"scheduling": {"latency_target_ms": -1}}, "scheduling.latency_target_ms"),
        ({"scheduling": {"batch_wait_ms": 1e9}}, "scheduling.batch_wait_ms"),
        ({"scheduling": {"cores": [1, -1]}}, "scheduling.cores"),
        ({"scheduling": {"gpu_memory_mb": 1 << 60}}, "scheduling.gpu_memory_mb"),
        ({"deployment_id": "a/b"}, "deployment_id"),
        ({"deployment_id": "a\n"}, "deployment_id"),
        ({"digest": BOUND + "\n"}, "digest"),
        ({"size": 0}, "size"),
        ({"chunk_size": LIMITS.chunk_bytes + 1}, "chunk_size"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{"name": "x", "dtype": "float32", "shape": [2**30, 2**30]}]}, "shape of 'x'"),
        ({"inputs": [{"name": "x", "dtype": "float32", "shape": [-2]}]}, "shape of 'x'"),
        ({"outputs": [{"name": "y", "dtype": "float32", "shape": [1] * 17}]}, "rank of 'y'"),
    ],
)
def test_a_desired_state_is_bounded_and_the_field_is_named(change: dict[str, Any], said: str) -> None:
    state = json.loads(encode(desired(3, ("one", "a"))))
    deployment = state["deployments"][0]
    for key, value in change.items():
        place = next(one for one in (state, deployment, deployment["manifest"]) if key in one)
        place[key] = value
    with pytest.raises(WireError, match=said) as found:
        decode(json.dumps(state).encode(), DesiredState)
    assert found.value.code is WireErrorCode.MALFORMED


def test_a_desired_state_names_an_id_and_a_model_once() -> None:
    for twice, said in (
        (desired(3, ("one", "a"), ("two", "b")), "a model twice"),
        (desired(3, ("one", "a"), ("one", "b")), "an id twice"),
    ):
        with pytest.raises(WireError, match=said):
            decode(encode(twice), DesiredState)


def test_an_acknowledgement_of_numbers_no_database_holds_is_refused() -> None:
    with pytest.raises(WireError, match="sequences"):
        decode(encode(TelemetryAck("s", (2**64 - 1,))), TelemetryAck)


RENEW = b'{"protocol":{"current":1,"oldest":1},"csr":"c","signature":"AQI="}'
CERTIFICATE = (
    b'{"key_sha256":"' + b"a" * 64 + b'","certificate":"c","ca":"r","not_before":1.0,"not_after":2.0,"failure":null}'
)


def test_a_renewal_as_it_is_on_the_wire_and_its_bounds() -> None:
    asked, given_ = decode(RENEW, Renew), decode(CERTIFICATE, Certificate)
    assert (asked.csr, asked.signature) == ("c", b"\1\2")
    assert (encode(asked), encode(given_)) == (RENEW, CERTIFICATE)
    for message, change, said in (
        (asked, {"csr": "c" * (LIMITS.csr_chars + 1)}, "csr"),
        (asked, {"signature": bytes(LIMITS.signature_bytes + 1)}, "signature"),
        (given_, {"key_sha256": "A" * 64}, "key_sha256"),
        (given_, {"certificate": "c" * (LIMITS.certificate_chars + 1)}, "certificate"),
        (given_, {"ca": "c" * (LIMITS.certificate_chars + 1)}, "ca"),
        (given_, {"not_after": -1.0}, "not_after"),
        (given_, {"not_before": 1e300}, "not_before"),
    ):
        with pytest.raises(WireError, match=said):
            decode(encode(msgspec.structs.replace(message, **change)), type(message))


@settings(max_examples=200, deadline=None)
@given(topic=st.text(max_size=200) | st.from_regex(r"shoal/v1/[0-9a-z+#/]{0,60}", fullmatch=True))
def test_topics_of_nobody(topic: str) -> None:
    for parse in (parse_device_topic, parse_chunk_topic):
        try:
            parse(topic)
        except WireError:
            continue


REQUEST = {"id": "r", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_inference_requests_of_nobody(data: st.DataObject) -> None:
    """A request is decoded into arrays of the model's own dtypes, or refused with a sentence."""
    body: Any = json.loads(json.dumps(REQUEST))
    field = data.draw(st.sampled_from(["inputs", "name", "datatype", "shape", "data", "parameters", "outputs", "none"]))
    if field in {"inputs", "outputs", "parameters"}:
        body[field] = data.draw(VALUES)
    elif field != "none":
        body["inputs"][0][field] = data.draw(VALUES)
    header = json.dumps(body).encode()
    tail = data.draw(st.binary(max_size=40))
    length = data.draw(st.none() | st.integers(-5, len(header) + 50) | st.just(len(header)))
    with contextlib.suppress(BadRequestError):
        request = decode_request(header + tail, length, manifest(-1, 8))
        assert request.inputs["x"].dtype == np.float32
        assert request.inputs["x"].shape[1:] == (2,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "z"}, "no input 'z', but x"),
        ({"datatype": "INT64"}, "takes FP32"),
        ({"shape": [1, 3]}, r"takes \[-1, 2\]"),
        ({"shape": [10**9, 2]}, "does not fill"),
        ({"shape": [2**40, 2]}, "no usable shape"),
        ({"shape": [-1, 2]}, "no usable shape"),
        ({"data": [1.0]}, "does not fill"),
        ({"data": ["a", "b"]}, "does not fill"),
        ({"data": None, "parameters": {"binary_data_size": 8}}, "does not fill"),
        ({"data": None, "parameters": {"binary_data_size": -1}}, "not a size"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], said: str) -> None:
    body = {"inputs": [{**REQUEST["inputs"][0], **change}]}  # type: ignore[dict-item]
    with pytest.raises(BadRequestError, match=said):
        decode_request(json.dumps(body).encode(), None, manifest(-1, 8))


def sent(path: str, body: bytes, header: str) -> bytes:
    lengths = f"Inference-Header-Content-Length: {header}\r\nContent-Length: {len(body)}"
    return f"POST /v2/models/m/{path} HTTP/1.1\r\nHost: d\r\n{lengths}\r\n\r\n".encode("latin-1") + body


@pytest.mark.parametrize("header", ["9³", "²", "-1", "1e9", "9" * 400])
def test_a_length_that_is_no_number_is_not_the_servers_failure(header: str) -> None:
    """`str.isdigit` takes superscripts, which `int` does not."""
    TARGETS["http"].run(sent("infer", json.dumps(REQUEST).encode(), header))


@pytest.mark.parametrize("label", [-1, 2**40, [0, -5]])
def test_a_label_that_the_fleet_server_would_refuse_is_refused_at_once(label: Any) -> None:
    """A batch that holds one would be sent for ever, and everything after it with it."""
    asked = sent("infer", json.dumps(REQUEST).encode(), "")
    TARGETS["http"].run(asked + sent("feedback", json.dumps({"labels": [{"id": "r", "label": label}]}).encode(), ""))


def damaged(tmp_path: Path, change: Any) -> Path:
    path = tmp_path / "set.npz"
    np.savez(path, x=np.zeros((3, 2), np.float32), y=np.arange(3))
    change(path)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-80]), "damaged"),
        (lambda path: path.write_bytes(b"no zip at all"), "damaged"),
        (lambda path: np.savez(path, z=np.zeros(3)), "x"),
        (lambda path: np.savez(path, x=np.float32(1)), "axis"),
        (lambda path: np.savez(path, x=np.array(["a"])), "could not convert"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("x", b"1"), "no arrays"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
def test_a_data_set_that_can_not_be_read_says_why(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(DataSetError, match=said):
        read_checked(damaged(tmp_path, change), manifest(-1, 8).inputs)


def test_a_data_set_unpacks_to_so_much_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.trial.dataset.UNPACKED_BYTES", 100)
    with pytest.raises(DataSetError, match="more than 100 bytes"):
        read_checked(damaged(tmp_path, lambda _: None), manifest(-1, 8).inputs)
