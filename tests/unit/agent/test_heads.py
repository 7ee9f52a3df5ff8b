"""JSON parts of requests that were read before say the same as when they are read anew."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from agent.protocol.manifest import TensorSpec
from agent.serving import heads as module
from agent.serving.bad_request import BadRequestError
from agent.serving.heads import Heads
from agent.serving.oip import InferRequest, decode_request
from tests.unit.agent.test_serving_models import manifest

NET = manifest(-1, 8)
OTHER = msgspec.structs.replace(NET, inputs=(TensorSpec("x", "int32", (-1, 2)),))


def whole(values: list[float], rows: int | None = None, datatype: str = "FP32", **more: Any) -> tuple[bytes, int]:
    blob = np.array(values, np.float32 if datatype == "FP32" else np.int32).tobytes()
    shape = [len(values) // 2 if rows is None else rows, 2]
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(blob)}}
    head = msgspec.json.encode({"inputs": [tensor], **more})
    return head + blob, len(head)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each part that is read."""
    found: list[int] = []

    def counted(*given: Any) -> InferRequest:
        found.append(1)
        return decode_request(*given)

    monkeypatch.setattr(module, "decode_request", counted)
    return found


def read(heads: Heads, given: tuple[bytes, int], net: Any = NET) -> InferRequest:
    return heads.read(*given, net, None)


def test_a_part_is_read_once_and_its_tensors_each_time(decoded: list[int]) -> None:
    heads = Heads()
    more = {"parameters": {"priority": 7, "timeout": 5000, "binary_data_output": True}}
    for number in range(3):
        found = read(heads, whole([number, 2.0], **more))
        assert found.inputs["x"].tolist() == [[number, 2.0]]
        assert (found.priority, found.timeout_s, found.outputs[0].binary) == (7, 0.005, True)
    assert len(decoded) == 1


def test_another_model_reads_it_anew(decoded: list[int]) -> None:
    heads = Heads()
    read(heads, whole([1.0, 2.0]))
    with pytest.raises(BadRequestError, match="datatype"):
        read(heads, whole([1.0, 2.0]), OTHER)
    assert len(decoded) == 2


def test_a_body_of_another_length_is_refused_as_ever() -> None:
    heads = Heads()
    content, length = whole([1.0, 2.0])
    heads.read(content, length, NET, None)
    with pytest.raises(BadRequestError, match="does not fill"):
        heads.read(content[:-1], length, NET, None)
    with pytest.raises(BadRequestError, match="no input claims"):
        heads.read(content + b"x", length, NET, None)


def test_requests_with_ids_or_numbers_in_json_are_read_each_time(decoded: list[int]) -> None:
    heads = Heads()
    in_json = msgspec.json.encode({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [3.0, 4.0]}]})
    for _ in range(2):
        assert read(heads, whole([1.0, 2.0], id="a")).request_id == "a"
        assert read(heads, (in_json, len(in_json))).inputs["x"].tolist() == [[3.0, 4.0]]
    assert len(decoded) == 4


class Lent:
    """Shared memory with a region that holds two numbers, and has room for as many bytes as it says."""

    def __init__(self) -> None:
        self.content = np.array([1.0, 2.0], np.float32).tobytes()
        self.room = 64
        self.gone = False

    def read(self, region: str, offset: int, size: int) -> bytes:
        if self.gone:
            raise BadRequestError(f"{region} is not registered")
        return self.content[offset : offset + size]

    def check(self, region: str, offset: int, size: int) -> None:
        if offset + size > self.room:
            raise BadRequestError(f"{region} has {self.room} bytes")

    def write(self, region: str, offset: int, content: bytes) -> None:
        raise AssertionError("nothing is answered here")


def placed() -> tuple[bytes, int]:
    spot = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": spot}
    output = {"name": NET.outputs[0].name, "parameters": {**spot, "shared_memory_offset": 8}}
    head = msgspec.json.encode({"inputs": [tensor], "outputs": [output]})
    return head, len(head)


def test_what_lies_in_shared_memory_is_looked_at_each_time(decoded: list[int]) -> None:
    heads, memory = Heads(), Lent()
    for number in (1.0, 3.0):
        memory.content = np.array([number, 2.0], np.float32).tobytes()
        found = heads.read(*placed(), NET, memory)
        assert found.inputs["x"].tolist() == [[number, 2.0]]
        assert found.outputs[0].span is not None
    assert len(decoded) == 1
    memory.room = 12
    with pytest.raises(BadRequestError, match="has 12 bytes") as small:
        heads.read(*placed(), NET, memory)
    assert small.value.field == ("outputs", NET.outputs[0].name, "parameters", "shared_memory_region")
    memory.gone = True
    with pytest.raises(BadRequestError, match="not registered") as gone:
        heads.read(*placed(), NET, memory)
    assert gone.value.field == ("inputs", "x", "parameters", "shared_memory_region")


def test_who_may_use_no_shared_memory_is_refused_what_another_was_given() -> None:
    heads = Heads()
    heads.read(*placed(), NET, Lent())
    with pytest.raises(BadRequestError, match="on this device alone"):
        heads.read(*placed(), NET, None)


def test_what_is_remembered_is_bounded(decoded: list[int]) -> None:
    heads = Heads()
    for number in range(3 * module.MOST):
        read(heads, whole([1.0, 2.0], parameters={"timeout": number}))
    assert len(heads._known) <= module.MOST
    assert len(decoded) == 3 * module.MOST
