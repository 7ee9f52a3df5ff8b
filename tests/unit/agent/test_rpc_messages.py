"""Messages of gRPC as requests of the routes, and what is hostile in them; no sockets."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from agent.protocol.manifest import TensorSpec
from agent.serving.bad_request import BadRequestError
from agent.serving.oip import LONGEST_US, decode_request
from agent.serving.rpc import wire
from agent.serving.rpc.calls import METHODS, Caller, Method
from agent.serving.rpc.inference import TENSORS_LIMIT, request_body
from agent.serving.rpc.schema import message_class
from agent.serving.rpc.server import _is_local
from tests.serving_worker import described

ModelInferRequest = message_class("ModelInferRequest")
ROWS: dict[str, tuple[str, str, list[Any]]] = {
    "bool": ("BOOL", "bool_contents", [True, False]),
    "int8": ("INT8", "int_contents", [-128, 127]),
    "int16": ("INT16", "int_contents", [-(2**15), 2**15 - 1]),
    "int32": ("INT32", "int_contents", [-(2**31), 2**31 - 1]),
    "int64": ("INT64", "int64_contents", [-(2**63), 2**63 - 1]),
    "uint8": ("UINT8", "uint_contents", [0, 255]),
    "uint16": ("UINT16", "uint_contents", [0, 65535]),
    "uint32": ("UINT32", "uint_contents", [0, 2**32 - 1]),
    "uint64": ("UINT64", "uint64_contents", [0, 2**64 - 1]),
    "float32": ("FP32", "fp32_contents", [0.5, -3e7]),
    "float64": ("FP64", "fp64_contents", [0.1, -3e70]),
    "string": ("BYTES", "bytes_contents", [b"", "été".encode()]),
}


def asked(datatype: str = "FP32", shape: tuple[int, ...] = (1, 2), **contents: Any) -> Any:
    message = ModelInferRequest(model_name="m", id="mine")
    tensor = message.inputs.add(name="x", datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    return message


def understood(message: Any, dtype: str = "float32", remaining_s: float | None = None) -> Any:
    body, length = request_body(message, remaining_s)
    manifest = described("m", (TensorSpec("x", dtype, (-1, 2)),), (TensorSpec("y", dtype, (-1, 2)),))
    return decode_request(body, length, manifest)


@pytest.mark.parametrize("dtype", sorted(ROWS))
def test_typed_contents(dtype: str) -> None:
    datatype, field, values = ROWS[dtype]
    found = understood(asked(datatype, **{field: values}), dtype)
    wanted = [one.decode() if isinstance(one, bytes) else one for one in values]
    assert found.inputs["x"].tolist() == [wanted]
    assert found.request_id == "mine"
    assert [one.binary for one in found.outputs] == [True]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (asked("INT8", int_contents=[1, 128]), "INT8 is -128 to 127"),
        (asked("UINT16", uint_contents=[1, 65536]), "UINT16 is 0 to 65535"),
        (asked("INT64", int_contents=[1, 2]), "can't hold 'INT64': use contents.int64_contents"),
        (asked("FP16", fp32_contents=[1, 2]), "can't hold 'FP16': use raw_input_contents"),
        (asked("FP32", fp32_contents=[1, 2], fp64_contents=[1, 2]), "can't hold"),
        (asked("FP32", fp32_contents=[1]), "it has 4 bytes, and 8 are taken"),
        (asked("FP32", (10**9, 2), fp32_contents=[1, 2]), "it has 8 bytes, and 8000000000 are taken"),
        (asked("FP32", (2**62, 2), fp32_contents=[1, 2]), "no usable shape"),
        (asked("FP32", (-1, 2), fp32_contents=[1, 2]), "no usable shape"),
        (asked("FP32", (1,) * 33, fp32_contents=[1]), "32 dimensions"),
        (asked("FP32"), "its data comes by one of contents, raw_input_contents"),
        (ModelInferRequest(model_name="m"), "x is missing"),
        (ModelInferRequest(model_name="m", id="i" * 257), "id: it may have 256"),
        (ModelInferRequest(inputs=[{"name": "x"}] * (TENSORS_LIMIT + 1)), "inputs: there may be"),
        (ModelInferRequest(outputs=[{"name": "x"}] * (TENSORS_LIMIT + 1)), "outputs: there may be"),
        (ModelInferRequest(inputs=[{"name": "x" * 2000}]), "a name may have"),
        (ModelInferRequest(inputs=[{"name": "x"}], raw_input_contents=[b"", b""]), "there are 2 for 1 inputs"),
    ],
)
def test_what_does_not_fit_is_named(message: Any, said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        understood(message)


def test_contents_come_one_way_only() -> None:
    message = asked(fp32_contents=[1, 2])
    message.raw_input_contents.append(b"\0" * 8)
    with pytest.raises(BadRequestError, match="its data comes by one of"):
        understood(message)


def test_the_deadline_is_the_requests() -> None:
    message = asked(fp32_contents=[1, 2])
    assert understood(message).timeout_s == 0
    assert understood(message, remaining_s=2.5).timeout_s == 2.5
    assert understood(message, remaining_s=-1).timeout_s == 1e-6
    assert understood(message, remaining_s=1e12).timeout_s == LONGEST_US / 1e6
    message.parameters["timeout"].int64_param = 1_000_000
    message.parameters["priority"].uint64_param = 7
    assert understood(message).timeout_s == 1
    assert understood(message, remaining_s=0.5).timeout_s == 0.5
    assert understood(message, remaining_s=5).timeout_s == 1
    assert understood(message).priority == 7
    message.parameters["timeout"].int64_param = -1
    with pytest.raises(BadRequestError, match="timeout is how many microseconds"):
        understood(message, remaining_s=5)


@pytest.mark.parametrize(("name", "value"), [("priority", "1"), ("timeout", True), ("priority", 1.5)])
def test_parameters_are_of_their_kind(name: str, value: Any) -> None:
    message = asked(fp32_contents=[1, 2])
    kinds = {str: "string_param", bool: "bool_param", float: "double_param"}
    setattr(message.parameters[name], kinds[type(value)], value)
    message.parameters["of another server"].string_param = "ignored"
    with pytest.raises(BadRequestError, match=f"parameters: {name} is given by {kinds[type(value)]}"):
        understood(message)


def test_raw_tensors_may_be_large_and_all_else_may_not() -> None:
    message = asked()
    message.raw_input_contents.append(bytes(wire.DECODED_LIMIT + 1))
    wire.check(message.SerializeToString())
    with pytest.raises(BadRequestError, match="send tensors there"):
        wire.check(asked(fp32_contents=np.ones(wire.DECODED_LIMIT // 4, np.float32)).SerializeToString())
    with pytest.raises(BadRequestError, match="1024 fields"):
        wire.check(b"\x2a\x00" * wire.UNSEEN)


@pytest.mark.parametrize("end", [b"\x0b" * 9, b"\x3a\x7f", b"\xff" * 20, b"\x3a\xff\xff\xff\xff\x0f", b"\x0d\0"])
def test_what_is_no_message_is_refused(end: bytes) -> None:
    raw = ModelInferRequest(model_name="m", raw_input_contents=[bytes(wire.UNSEEN)]).SerializeToString() + end
    with pytest.raises(BadRequestError, match="no protocol buffer"):
        wire.check(raw)


@given(some.sampled_from(METHODS), some.binary(max_size=200))
def test_whatever_comes_is_understood_or_refused(name: str, raw: bytes) -> None:
    try:
        request = Method(name).request(raw, Caller(local=True))
    except BadRequestError:
        return
    assert request.local
    assert request.path.startswith("/v2")


@given(some.binary(max_size=100), some.integers(0, 3), some.lists(some.integers(-(2**63), 2**63 - 1), max_size=40))
def test_tensors_of_any_shape_and_content(raw: bytes, count: int, shape: list[int]) -> None:
    message = ModelInferRequest(model_name="m", raw_input_contents=[raw] * count)
    message.inputs.add(name="x", datatype="FP32", shape=shape)
    try:
        found = understood(message)
    except BadRequestError:
        return
    assert found.inputs["x"].nbytes == len(raw)


def test_messages_of_small_methods_are_small() -> None:
    with pytest.raises(BadRequestError, match="a message of ModelReady may have"):
        Method("ModelReady").request(bytes(wire.UNSEEN + 1), Caller(local=True))


@pytest.mark.parametrize("name", ["a/b", "..", "é %2f?x", "m" * 255])
def test_names_stay_names_in_paths(name: str) -> None:
    raw = message_class("ModelReadyRequest")(name=name, version=name).SerializeToString()
    path = Method("ModelReady").request(raw, Caller(local=False)).path
    assert path.count("/") == 6
    assert "?" not in path


@pytest.mark.parametrize("name", ["", "m" * 256])
def test_names_have_a_length(name: str) -> None:
    raw = message_class("ModelInferRequest")(model_name=name).SerializeToString()
    with pytest.raises(BadRequestError, match="model_name: it has"):
        Method("ModelInfer").request(raw, Caller(local=False))


def test_the_parameters_of_a_load_are_named_to_the_routes() -> None:
    message = message_class("RepositoryModelLoadRequest")(model_name="m")
    message.parameters["config"].string_param = "{}"
    request = Method("RepositoryModelLoad").request(message.SerializeToString(), Caller(local=True))
    assert msgspec.json.decode(request.body) == {"parameters": {"config": None}}


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:40000", True),
        ("ipv6:%5B::1%5D:40000", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:40000", True),
        ("unix:", True),
        ("unix:/run/grpc.sock", True),
        ("ipv4:10.0.0.7:40000", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:40000", False),
        ("dns:127.0.0.1:1", False),
        ("", False),
    ],
)
def test_who_is_on_this_device(peer: str, local: bool) -> None:
    assert _is_local(peer) is local
