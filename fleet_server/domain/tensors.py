"""Requests and answers of the Open Inference Protocol v2 as bytes: cut by rows and joined again. Pure.

A row is what lies at one index of a tensor's first axis. Values are never looked at, so what a device answered comes to
the caller bit for bit.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from agent.protocol.datatypes import HEADER_LENGTH
from agent.protocol.limits import LIMITS
from fleet_server.errors import InvalidError

_NUMBERS = (
    *(("BOOL", 1, "?"), ("UINT8", 1, "B"), ("INT8", 1, "b"), ("UINT16", 2, "H"), ("INT16", 2, "h")),
    *(("FP16", 2, "e"), ("BF16", 2, ""), ("UINT32", 4, "I"), ("INT32", 4, "i"), ("FP32", 4, "f")),
    *(("UINT64", 8, "Q"), ("INT64", 8, "q"), ("FP64", 8, "d")),
)
SIZES = {name: size for name, size, _ in _NUMBERS}
_CODES = {name: code for name, _, code in _NUMBERS if code}
_LENGTH = struct.Struct("<I")
JSON_BYTES = 16 << 20  # of a request whose numbers are text


class TensorError(ValueError):
    """What came is no request or answer that can be read; the text says which field."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a request or an answer.

    Attributes:
        name: of it.
        datatype: the protocol's.
        shape: rows first.
        data: row after row, little-endian; of `BYTES` each element stands behind its length.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def rows(self) -> int:
        """Along the first axis."""
        return self.shape[0]

    def cut(self, first: int, last: int) -> Tensor:
        """The rows from `first` up to, and without, `last`."""
        begin, end = self._offset(first), self._offset(last)
        return Tensor(self.name, self.datatype, (last - first, *self.shape[1:]), self.data[begin:end])

    def filled(self, rows: int) -> Tensor:
        """The same with its last row again and again, until there are so many rows."""
        more = rows - self.rows
        if more <= 0:
            return self
        last = self.cut(self.rows - 1, self.rows).data
        return Tensor(
            self.name, self.datatype, (rows, *self.shape[1:]), memoryview(b"".join([self.data, *[last] * more]))
        )

    def largest_row(self) -> int:
        """Bytes of the largest row."""
        if self.datatype != "BYTES":
            return self.data.nbytes // max(self.rows, 1)
        return max((self._offset(one + 1) - self._offset(one) for one in range(self.rows)), default=0)

    def like(self, other: Tensor) -> bool:
        """Whether rows of both may stand in one tensor."""
        return (self.name, self.datatype, self.shape[1:]) == (other.name, other.datatype, other.shape[1:])

    def _offset(self, row: int) -> int:
        if self.datatype != "BYTES":
            return row * (self.data.nbytes // max(self.rows, 1))
        return self._ends[row * math.prod(self.shape[1:])]

    @cached_property
    def _ends(self) -> list[int]:
        return _ends(self.data)


class _Parameters(msgspec.Struct):
    binary_data_size: int | None = None


class _Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: _Parameters | None = None
    data: msgspec.Raw = msgspec.Raw()


class _Name(msgspec.Struct):
    name: str


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    outputs: list[_Name] | None = None
    id: str = ""


class _Answer(msgspec.Struct):
    outputs: list[_Tensor]
    model_version: str = ""


_REQUEST, _ANSWER = msgspec.json.Decoder(_Request), msgspec.json.Decoder(_Answer)


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        inputs: with the same number of rows.
        outputs: names of those that are wanted; none for all of them.
        id: the client's.
        binary: whether its tensors were binary: its answer's are then.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    id: str
    binary: bool

    @property
    def rows(self) -> int:
        """Of each input."""
        return self.inputs[0].rows

    def row_bytes(self) -> int:
        """Bytes of the largest row of all inputs."""
        return sum(one.largest_row() for one in self.inputs)

    def part(self, first: int, last: int, fill: int = 0) -> tuple[bytes, int]:
        """The request for some of the rows, and the length of its JSON.

        Args:
            first: of the rows.
            last: the row after the last one.
            fill: rows that the request has at least; those that there are not are the last one again.
        """
        said: dict[str, Any] = {"parameters": {"binary_data_output": True}}
        if self.outputs:
            said["outputs"] = [{"name": one, "parameters": {"binary_data": True}} for one in self.outputs]
        return binary_body(said, "inputs", [one.cut(first, last).filled(fill) for one in self.inputs])


def read_request(body: bytes, header_length: int | None) -> Asked:
    """Read a request.

    Args:
        body: whole.
        header_length: of its JSON, where binary tensors follow it.

    Raises:
        InvalidError: naming the field.
    """
    if header_length is None and len(body) > JSON_BYTES:
        raise InvalidError("wrong_input", f"inputs: as text at most {JSON_BYTES >> 20} MiB: send them in binary form")
    try:
        header, inputs = _read(_REQUEST, body, header_length, "inputs")
    except TensorError as error:
        raise InvalidError("wrong_input", str(error), field=str(error).partition(":")[0]) from None
    if not inputs:
        raise InvalidError("wrong_input", "inputs: there is none: send one at least", field="inputs")
    rows = {one.rows for one in inputs}
    if len(rows) > 1:
        detail = ", ".join(f"{one.name} {one.rows}" for one in inputs)
        said = f"inputs: their first axes are rows, and differ: {detail}: send as many of each"
        raise InvalidError("rows_disagree", said, field="inputs")
    if rows == {0}:
        raise InvalidError("wrong_input", "inputs: there are no rows: send one at least", field="inputs")
    wanted = tuple(one.name for one in header.outputs or ())
    return Asked(tuple(inputs), wanted, header.id, header_length is not None)


def read_answer(body: bytes, header_length: int, rows: int) -> tuple[tuple[Tensor, ...], str]:
    """A device's answer: its outputs, and which version answered.

    Raises:
        TensorError: where it is none for so many rows.
    """
    header, outputs = _read(_ANSWER, body, header_length, "outputs")
    if not outputs:
        raise TensorError("outputs: there is none")
    for one in outputs:
        if one.rows != rows:
            raise TensorError(f"outputs.{one.name[:100]}: {one.rows} rows for {rows}")
    return tuple(outputs), header.model_version


def as_request(body: bytes, header_length: int, rows: int) -> tuple[bytes, int]:
    """A stage's answer as the request to the next stage, whose inputs have the same names; and the length of its JSON.

    Raises:
        TensorError: where it is no answer for so many rows.
    """
    outputs, _ = read_answer(body, header_length, rows)
    return binary_body({"parameters": {"binary_data_output": True}}, "inputs", outputs)


def write_answer(parts: Sequence[Sequence[Tensor]], said: dict[str, Any], *, binary: bool) -> tuple[bytes, int | None]:
    """One answer of the outputs of several, in their order; and the length of its JSON where tensors follow it."""
    joined = [
        Tensor(
            like[0].name,
            like[0].datatype,
            (sum(one.rows for one in like), *like[0].shape[1:]),
            memoryview(b"".join(one.data for one in like)),
        )
        for like in zip(*parts, strict=True)
    ]
    if binary:
        return binary_body(said, "outputs", joined)
    said["outputs"] = [
        {"name": one.name, "datatype": one.datatype, "shape": one.shape, "data": _values(one)} for one in joined
    ]
    return msgspec.json.encode(said), None


def binary_body(said: dict[str, Any], key: str, tensors: Sequence[Tensor]) -> tuple[bytes, int]:
    """A body whose tensors follow its JSON, and the length of that.

    Args:
        said: what the JSON says beside them.
        key: `inputs` or `outputs`.
        tensors: in their order.
    """
    said[key] = [
        {
            "name": one.name,
            "datatype": one.datatype,
            "shape": one.shape,
            "parameters": {"binary_data_size": one.data.nbytes},
        }
        for one in tensors
    ]
    header = msgspec.json.encode(said)
    return b"".join([header, *(one.data for one in tensors)]), len(header)


def _read(decoder: Any, body: bytes, header_length: int | None, key: str) -> tuple[Any, list[Tensor]]:
    whole, at = memoryview(body), len(body) if header_length is None else header_length
    if not 0 <= at <= len(body):
        raise TensorError(f"{HEADER_LENGTH}: the body has {len(body)} bytes")
    try:
        header = decoder.decode(whole[:at])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TensorError(f"{key}: the JSON part can't be read: {str(error)[:200]}") from None
    told: list[_Tensor] = getattr(header, key)
    if len(told) > LIMITS.tensors:
        raise TensorError(f"{key}: {len(told)} tensors, at most {LIMITS.tensors}")
    found, seen = [], set()
    for one in told:
        where = f"{key}.{one.name[:100]}"
        if len(one.name) > LIMITS.name_chars or one.name in seen:
            raise TensorError(f"{where}: its name is too long, or comes twice")
        seen.add(one.name)
        _check_shape(one, where)
        size = one.parameters.binary_data_size if one.parameters is not None else None
        if size is None:
            data = memoryview(_packed(one, where))
        elif header_length is None or not 0 <= size <= len(body) - at:
            raise TensorError(f"{where}: binary_data_size is {size}, and {len(body) - at} bytes are left")
        else:
            data, at = whole[at : at + size], at + size
        found.append(_checked(one, data, where))
    if header_length is not None and at != len(body):
        raise TensorError(f"{key}: {len(body) - at} bytes follow the last tensor")
    return header, found


def _check_shape(one: _Tensor, where: str) -> None:
    if one.datatype != "BYTES" and one.datatype not in SIZES:
        raise TensorError(f"{where}: {one.datatype[:40]!r} is no datatype; there are BYTES, {', '.join(SIZES)}")
    if not 1 <= len(one.shape) <= LIMITS.tensor_rank:
        raise TensorError(f"{where}: its shape has {len(one.shape)} axes; the first one is rows")
    if min(one.shape) < 0 or math.prod(one.shape) > LIMITS.tensor_elements:
        raise TensorError(f"{where}: its shape is negative or too large")


def _checked(one: _Tensor, data: memoryview, where: str) -> Tensor:
    count = math.prod(one.shape)
    if one.datatype == "BYTES":
        if len(_ends(data, count, where)) != count + 1:
            raise TensorError(f"{where}: its bytes are not {count} elements, as its shape says")
    elif data.nbytes != count * SIZES[one.datatype]:
        raise TensorError(f"{where}: {data.nbytes} bytes; its shape and datatype say {count * SIZES[one.datatype]}")
    return Tensor(one.name, one.datatype, tuple(one.shape), data)


def _ends(data: memoryview, most: int | None = None, where: str = "") -> list[int]:
    """Where elements of `BYTES` begin, and the end of the last one."""
    ends, at = [0], 0
    while at < data.nbytes and (most is None or len(ends) <= most + 1):
        if at + 4 > data.nbytes:
            raise TensorError(f"{where}: an element is cut off")
        at += 4 + _LENGTH.unpack_from(data, at)[0]
        if at > data.nbytes:
            raise TensorError(f"{where}: an element is cut off")
        ends.append(at)
    return ends


def _packed(one: _Tensor, where: str) -> bytes:
    """Values given as JSON, as bytes."""
    try:
        values = _flat(msgspec.json.decode(bytes(one.data)), LIMITS.tensor_rank)
        if one.datatype == "BYTES":
            return bytes_of_texts([str(value).encode() for value in values])
        return struct.pack(f"<{len(values)}{_CODES[one.datatype]}", *values)
    except (
        msgspec.MsgspecError,
        KeyError,
        ValueError,
        OverflowError,
        TypeError,
        struct.error,
        RecursionError,
    ) as error:
        raise TensorError(f"{where}: its data are no {one.datatype} values: {str(error)[:100]}") from None


def _flat(values: Any, depth: int) -> list[Any]:
    if not isinstance(values, list) or depth == 0:
        raise ValueError("an array of values is needed")
    if values and isinstance(values[0], list):
        return [value for row in values for value in _flat(row, depth - 1)]
    return values


def texts_of(tensor: Tensor) -> list[bytes]:
    """Elements of `BYTES`."""
    return [bytes(tensor.data[a + 4 : b]) for a, b in itertools.pairwise(_ends(tensor.data))]


def bytes_of_texts(texts: Sequence[bytes]) -> bytes:
    """Elements of `BYTES`, each behind its length."""
    return b"".join(_LENGTH.pack(len(text)) + text for text in texts)


def _values(tensor: Tensor) -> list[Any]:
    if tensor.datatype == "BYTES":
        return [text.decode(errors="replace") for text in texts_of(tensor)]
    code = _CODES.get(tensor.datatype)
    if code is None:
        raise InvalidError("wrong_input", f"outputs: {tensor.datatype} has no text form: ask in binary form")
    return list(struct.unpack(f"<{math.prod(tensor.shape)}{code}", tensor.data))
