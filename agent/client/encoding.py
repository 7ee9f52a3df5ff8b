"""Requests and answers of the Open Inference Protocol v2 with binary tensors, as a client sees them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from agent.client.errors import BadRequestError, ModelFailedError
from agent.protocol.manifest import TensorSpec
from agent.runtimes.base import STRING, Array
from agent.serving.bad_request import BadRequestError as TensorError
from agent.serving.tensors import DATATYPES, datatype, from_binary, from_json, to_binary

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TensorError, ValueError)


@dataclass(frozen=True)
class Part:
    """One input on its way.

    Attributes:
        name: of the input.
        kind: the protocol's datatype.
        shape: of it.
        content: its bytes, little-endian; strings are each behind their length.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    content: memoryview


@dataclass(frozen=True)
class Wish:
    """How a request is to be answered.

    Attributes:
        outputs: that are wanted; None for all of them.
        priority: 1 for the most urgent to 100; None for the middle.
        wait_s: how long it may wait for its turn, in seconds.
        request_id: names it for `/feedback`.
    """

    outputs: Sequence[str] | None = None
    priority: int | None = None
    wait_s: float | None = None
    request_id: str = ""


def parts_of(inputs: Mapping[str, Any]) -> list[Part]:
    """Inputs as bytes.

    Raises:
        BadRequestError: naming what is no array of numbers, truths or strings.
    """
    found = []
    for name, value in inputs.items():
        array = np.asarray(value)
        kind = datatype(array.dtype.name)
        if kind not in DATATYPES:
            raise BadRequestError(f"input {name!r}: arrays of {array.dtype} can't be sent: {', '.join(DATATYPES)} can")
        if kind == "BYTES":
            content = memoryview(to_binary(array))
        else:
            ready = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            content = ready.reshape(-1).view(np.uint8).data
        found.append(Part(name, kind, array.shape, content))
    return found


def header(parts: Sequence[Part], wish: Wish, *, region: str = "", offsets: Sequence[int] = ()) -> bytes:
    """The JSON of a request; with a region, that its inputs lie there."""
    told = []
    for number, part in enumerate(parts):
        where: dict[str, Any] = {"binary_data_size": part.content.nbytes}
        if region:
            where = {"shared_memory_region": region, "shared_memory_byte_size": part.content.nbytes}
            where |= {"shared_memory_offset": offsets[number]} if offsets[number] else {}
        told.append({"name": part.name, "datatype": part.kind, "shape": part.shape, "parameters": where})
    parameters: dict[str, Any] = {"binary_data_output": True}
    if wish.priority is not None:
        parameters["priority"] = wish.priority
    if wish.wait_s is not None:
        parameters["timeout"] = max(1, int(wish.wait_s * 1e6))
    body: dict[str, Any] = {"inputs": told, "parameters": parameters}
    if wish.request_id:
        body["id"] = wish.request_id
    if wish.outputs is not None:
        body["outputs"] = [{"name": one, "parameters": {"binary_data": True}} for one in wish.outputs]
    return msgspec.json.encode(body)


class _Parameters(msgspec.Struct):
    binary_data_size: int | None = None


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: _Parameters | None = None
    data: msgspec.Raw = msgspec.Raw()


class _Answer(msgspec.Struct):
    outputs: list[_Output]


_DECODER = msgspec.json.Decoder(_Answer)


def outputs_of(body: bytes, header_length: str) -> dict[str, Array]:
    """The outputs of an answer by name; arrays that may not be written, strings as arrays of objects.

    Raises:
        ModelFailedError: when the answer makes no sense.
    """
    length = int(header_length) if header_length.isascii() and header_length.isdigit() else len(body)
    found: dict[str, Array] = {}
    try:
        for one in _DECODER.decode(memoryview(body)[:length]).outputs:
            spec = TensorSpec(one.name, DATATYPES.get(one.datatype, STRING), tuple(one.shape))
            size = (one.parameters or _Parameters()).binary_data_size
            if size is None:
                found[one.name] = from_json(spec, bytes(one.data), one.shape)
            else:
                found[one.name] = from_binary(spec, body[length : length + size], one.shape)
                length += size
    except UNREADABLE as error:
        raise ModelFailedError(f"the inference API gave an answer that can't be read: {error}") from None
    return found
