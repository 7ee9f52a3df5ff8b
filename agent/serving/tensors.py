"""Tensors of requests and answers: JSON values, little-endian bytes and length-prefixed strings, to and from arrays.

It knows no request and no HTTP. A model's strings are Python's in arrays of objects; on the way they are UTF-8.
"""

from __future__ import annotations

import math
import re
import struct
from functools import cache
from typing import Annotated, Any

import msgspec
import numpy as np

from agent.protocol.datatypes import ARRAY_TYPES, BYTES
from agent.protocol.manifest import TensorSpec
from agent.runtimes.base import STRING, Array, numpy_dtype
from agent.serving.bad_request import BadRequestError

# A manifest's dtype, by the protocol's name of it.
DATATYPES = {name: np.dtype(kind).name for name, kind in ARRAY_TYPES.items()} | {BYTES: STRING}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
STRINGS_LIMIT = 1 << 20  # of one tensor: each takes ten times the memory that it takes on the way
_LENGTH = struct.Struct("<I")
Bytes = bytes | bytearray | memoryview
_OPENING = re.compile(rb"[\s\[]*")


@cache
def name_of(dtype: np.dtype[Any]) -> str:
    """NumPy's own name of a dtype, which takes it longer to find than all else that an answer needs."""
    return dtype.name


def datatype(dtype: str) -> str:
    """The protocol's name of a manifest's dtype, or of an array's."""
    return _NAMES.get(dtype) or (BYTES if dtype.startswith(("object", "str")) else dtype.upper())


def from_binary(spec: TensorSpec, raw: Bytes, shape: list[int]) -> Array:
    """Bytes of a request as an array, which refers to them where they lie as a runtime can read them.

    Raises:
        BadRequestError: when they are not as many as the shape takes, or strings that are none.
    """
    count = math.prod(shape)
    if spec.dtype == STRING:
        return _strings(spec, bytes(raw), count).reshape(shape)
    dtype = little_endian(spec.dtype)
    if len(raw) != count * dtype.itemsize:
        said = f"does not fill shape {shape}: it has {len(raw)} bytes, and {count * dtype.itemsize} are taken"
        raise BadRequestError(f"input {spec.name!r}: its data {said}", "data")
    array = np.frombuffer(raw, dtype)
    if spec.dtype == "bool" and array.view(np.uint8).max(initial=0) > 1:
        raise BadRequestError(f"input {spec.name!r}: a BOOL is one byte, 0 or 1", "data")
    return (array if array.flags.aligned else array.copy()).reshape(shape)


@cache
def little_endian(dtype: str) -> np.dtype[Any]:
    """A dtype as it is on the way."""
    return np.dtype(dtype).newbyteorder("<")


def _strings(spec: TensorSpec, raw: bytes, count: int) -> Array:
    found = np.empty(_string_count(spec, count), object)
    position = 0
    for index in range(count):
        start = position + _LENGTH.size
        if start > len(raw):
            raise BadRequestError(f"input {spec.name!r}: its data ends after {index} of {count} strings", "data")
        position = start + _LENGTH.unpack_from(raw, position)[0]
        if position > len(raw):
            raise BadRequestError(f"input {spec.name!r}: string {index} is said to be longer than the data", "data")
        try:
            found[index] = raw[start:position].decode()
        except UnicodeDecodeError:
            raise BadRequestError(f"input {spec.name!r}: string {index} is not UTF-8", "data") from None
    if position != len(raw):
        raise BadRequestError(
            f"input {spec.name!r}: {len(raw) - position} bytes follow the last of {count} strings", "data"
        )
    return found


def _string_count(spec: TensorSpec, count: int) -> int:
    if count > STRINGS_LIMIT:
        raise BadRequestError(f"input {spec.name!r}: a tensor may have {STRINGS_LIMIT} strings", "data")
    return count


def from_json(spec: TensorSpec, raw: bytes, shape: list[int]) -> Array:
    """JSON values of a request as an array: flat, or nested as the shape is.

    Each has to be of the model's own kind: a number for numbers, whole for integers, `true` or `false` for truths.
    Bytes are counted before anything is made of them, so that what is made is no larger than the shape says.

    Raises:
        BadRequestError: when they are not as many as the shape takes, or of another kind.
    """
    count = math.prod(shape)
    if spec.dtype == STRING:
        _string_count(spec, count)
    elif raw.count(b",") + 1 != count:
        said = f"does not fill shape {shape}: it has {raw.count(b',') + 1} values, and {count} are taken"
        raise BadRequestError(f"input {spec.name!r}: its data {said}", "data")
    opening = _OPENING.match(raw)
    depth = opening.group().count(b"[") if opening is not None else 0
    if depth not in {min(1, len(shape)), 1, len(shape)}:
        raise BadRequestError(
            f"input {spec.name!r}: its data is nested {depth} deep: flat, or as shape {shape} is", "data"
        )
    try:
        with np.errstate(over="raise"):
            array = np.array(_decoder(spec.dtype, depth).decode(raw), dtype=numpy_dtype(spec.dtype))
    except (msgspec.MsgspecError, ValueError, ArithmeticError, RecursionError) as error:
        raise BadRequestError(f"input {spec.name!r}: its data does not fill shape {shape}: {error}", "data") from None
    if array.size != count or (depth > 1 and list(array.shape) != shape):
        raise BadRequestError(
            f"input {spec.name!r}: its data does not fill shape {shape}: it has shape {list(array.shape)}", "data"
        )
    return array.reshape(shape)


@cache
def _decoder(dtype: str, depth: int) -> msgspec.json.Decoder[Any]:
    kind: Any = float
    if dtype in {STRING, "bool"}:
        kind = str if dtype == STRING else bool
    elif np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)  # of what is more than 64 bits take, numpy says that it is too much
        kind = Annotated[int, msgspec.Meta(ge=int(info.min), le=min(int(info.max), 2**63 - 1))]
        if dtype == "uint64":
            kind = Annotated[int, msgspec.Meta(ge=0)]
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def to_binary(array: Array) -> bytes:
    """An array of an answer as bytes."""
    if array.dtype.kind not in "OU":
        return array.astype(little_endian(name_of(array.dtype)), copy=False).tobytes()
    pieces = []
    for text in array.reshape(-1):
        encoded = str(text).encode(errors="replace")
        pieces += [_LENGTH.pack(len(encoded)), encoded]
    return b"".join(pieces)


def to_json(array: Array) -> list[Any]:
    """An array of an answer as a flat list of JSON values; what is no finite number becomes null."""
    flat = array.reshape(-1)
    if array.dtype.kind in "OU":
        return [str(text).encode(errors="replace").decode() for text in flat]
    values: list[Any] = flat.tolist()
    return values
