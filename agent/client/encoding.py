"""Requests and answers of the Open Inference Protocol v2 with binary tensors, as a client sees them. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from agent.client.errors import BadRequestError, ModelFailedError
from agent.client.http1 import Content
from agent.protocol.manifest import TensorSpec
from agent.runtimes.base import STRING, Array
from agent.serving.bad_request import BadRequestError as TensorError
from agent.serving.tensors import DATATYPES, datatype, from_binary, from_json, little_endian, name_of, to_binary

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TensorError, ValueError)


class Part(msgspec.Struct, frozen=True):
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


class Wish(msgspec.Struct, frozen=True):
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
        kind = datatype(name_of(array.dtype))
        if kind not in DATATYPES:
            said = f"input {name!r}: arrays of {array.dtype} can't be sent: {', '.join(DATATYPES)} can"
            raise BadRequestError(said, ("inputs", name, "datatype"))
        if kind == "BYTES":
            content = memoryview(to_binary(array))
        else:
            ready = np.ascontiguousarray(array, little_endian(name_of(array.dtype)))
            content = ready.reshape(-1).view(np.uint8).data
        found.append(Part(name, kind, array.shape, content))
    return found


class Placed(msgspec.Struct, frozen=True):
    """Where tensors of a request lie, or are to go, in shared memory.

    Attributes:
        region: as the API knows it.
        inputs: where each begins, in their order; empty where they are in the body.
        outputs: by name, where each may begin, and how many bytes it may have; others come in the body.
    """

    region: str
    inputs: Sequence[int]
    outputs: Mapping[str, tuple[int, int]]


def header(parts: Sequence[Part], wish: Wish, placed: Placed | None = None, outputs: Sequence[str] = ()) -> bytes:
    """The JSON of a request.

    Args:
        parts: its inputs.
        wish: how it is to be answered.
        placed: what is in shared memory; None: nothing.
        outputs: all that the model has, as far as some are to go to shared memory.
    """
    told = tuple((part.name, part.kind, part.shape, part.content.nbytes) for part in parts)
    region, inputs, rooms = ("", (), {}) if placed is None else (placed.region, placed.inputs, placed.outputs)
    named = wish.outputs if wish.outputs is not None or not rooms else outputs
    wanted = None if named is None else tuple((one, rooms.get(one)) for one in named)
    wait_ms = None if wish.wait_s is None else max(1, math.ceil(wish.wait_s * 1e3))  # the same for the same call again
    make = _header.__wrapped__ if wish.request_id else _header
    return make(told, wanted, region, tuple(inputs), wish.priority, wait_ms, wish.request_id)


@lru_cache(maxsize=64)
def _header(
    parts: tuple[tuple[str, str, tuple[int, ...], int], ...],
    outputs: tuple[tuple[str, tuple[int, int] | None], ...] | None,
    region: str,
    offsets: tuple[int, ...],
    priority: int | None,
    wait_ms: int | None,
    request_id: str,
) -> bytes:
    told = []
    for number, (name, kind, shape, size) in enumerate(parts):
        where = _span(region, offsets[number], size) if offsets else {"binary_data_size": size}
        told.append({"name": name, "datatype": kind, "shape": shape, "parameters": where})
    parameters: dict[str, Any] = {"binary_data_output": True}
    if priority is not None:
        parameters["priority"] = priority
    if wait_ms is not None:
        parameters["timeout"] = 1000 * wait_ms
    body: dict[str, Any] = {"inputs": told, "parameters": parameters}
    if request_id:
        body["id"] = request_id
    if outputs is not None:
        body["outputs"] = [
            {"name": one, "parameters": {"binary_data": True} if room is None else _span(region, *room)}
            for one, room in outputs
        ]
    return msgspec.json.encode(body)


def _span(region: str, offset: int, size: int) -> dict[str, Any]:
    said: dict[str, Any] = {"shared_memory_region": region, "shared_memory_byte_size": size}
    return said | ({"shared_memory_offset": offset} if offset else {})


class _Parameters(msgspec.Struct, frozen=True):
    binary_data_size: int | None = None
    shared_memory_region: str | None = None
    shared_memory_byte_size: int = 0
    shared_memory_offset: int = 0


class _Output(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: _Parameters | None = None
    data: msgspec.Raw = msgspec.Raw()


class _Answer(msgspec.Struct, frozen=True):
    outputs: tuple[_Output, ...]
    model_version: str = ""
    id: str = ""


_DECODER = msgspec.json.Decoder(_Answer)
KNOWN_MOST = 1024  # bytes of JSON that are remembered: with binary tensors, most answers of a model have the same


@lru_cache(maxsize=64)
def _known(content: bytes) -> _Answer:
    return _DECODER.decode(content)


class Answer(dict[str, Array]):
    """What a model answered: its outputs by name, strings as arrays of objects. The arrays are the caller's own.

    Attributes:
        version: of the model, that answered.
        request_id: that the request was given; empty where it was given none.
    """

    version = ""
    request_id = ""


def answer_of(
    body: Content,
    header_length: str,
    placed: Placed | None = None,
    read: Callable[[int, int], bytearray] | None = None,
) -> Answer:
    """Read an answer.

    Args:
        body: of the reply.
        header_length: of its JSON part, where binary tensors follow it.
        placed: where outputs were to go in shared memory; None: nowhere.
        read: copies bytes of it.

    Raises:
        ModelFailedError: when the answer makes no sense.
    """
    length = int(header_length) if header_length.isascii() and header_length.isdigit() else len(body)
    whole, rooms = memoryview(body), {} if placed is None else placed.outputs
    found = Answer()
    try:
        told = _known(bytes(whole[:length])) if length <= KNOWN_MOST else _DECODER.decode(whole[:length])
        for one in told.outputs:
            spec = TensorSpec(one.name, DATATYPES.get(one.datatype, STRING), tuple(one.shape))
            said = one.parameters or _Parameters()
            if said.shared_memory_region is not None:
                offset, most = rooms.get(one.name, (-1, 0))
                if read is None or offset != said.shared_memory_offset or not 0 <= said.shared_memory_byte_size <= most:
                    raise ValueError(f"output {one.name[:100]!r} lies where it was not to go")
                found[one.name] = from_binary(spec, read(offset, said.shared_memory_byte_size), one.shape)
            elif said.binary_data_size is not None:
                found[one.name] = from_binary(spec, whole[length : length + said.binary_data_size], one.shape)
                length += said.binary_data_size
            else:
                found[one.name] = from_json(spec, bytes(one.data), one.shape)
    except UNREADABLE as error:
        raise ModelFailedError(f"the inference API gave an answer that can't be read: {error}") from None
    found.version, found.request_id = told.model_version, told.id
    return found
