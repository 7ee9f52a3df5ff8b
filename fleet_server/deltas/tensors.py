"""Where the weights lie in a model's file: plain regions by offset. Knows ONNX and TFLite, and neither's library.

Files are of converters, but come from strangers' nets: every read is bounded by the file, and a file that can't be read
has no regions, which costs bytes and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

Buffer = memoryview

MOST = 200_000  # regions of a file
LEAST_BYTES = 64  # a smaller tensor gains nothing
ONNX_WIDTHS = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
TFLITE_WIDTHS = {0: 4, 1: 2, 2: 4, 4: 8, 7: 2, 10: 8, 12: 8, 15: 4, 16: 2}  # of TensorType; any other is of bytes
TFLITE_MAGIC = b"TFL3"


@dataclass(frozen=True)
class Region:
    """The elements of one tensor: `length` bytes from `start`, of little-endian elements of `width` bytes."""

    name: str
    start: int
    length: int
    width: int


def find_regions(data: Buffer) -> list[Region]:
    """A file's tensors in the order of their bytes, none over another; empty where it is of no format known here."""
    try:
        found = list(_tflite(data) if bytes(data[4:8]) == TFLITE_MAGIC else _onnx(data))
    except (ValueError, IndexError, struct.error, RecursionError):
        return []
    regions, end = [], 0
    for one in sorted(found, key=lambda region: region.start):
        if one.start >= end and one.length >= LEAST_BYTES:
            regions.append(one)
            end = one.start + one.length
    return regions[:MOST]


# -- ONNX: Protocol Buffers. ModelProto.graph = 7; GraphProto.node = 1, initializer = 5; NodeProto.attribute = 5;
# AttributeProto.t = 5; TensorProto.data_type = 2, float_data = 4, name = 8, raw_data = 9, double_data = 10


def _onnx(data: Buffer) -> Iterator[Region]:
    for field, start, end, _ in _fields(data, 0, len(data)):
        if field == 7:
            yield from _graph(data, start, end)


def _graph(data: Buffer, start: int, end: int) -> Iterator[Region]:
    for field, first, last, _ in _fields(data, start, end):
        if field == 5:
            yield from _tensor(data, first, last)
        elif field == 1:
            for inner, a, b, _ in _fields(data, first, last):
                if inner == 5:
                    for kind, c, d, _ in _fields(data, a, b):
                        if kind == 5:
                            yield from _tensor(data, c, d)


def _tensor(data: Buffer, start: int, end: int) -> Iterator[Region]:
    name, kind, found = "", 0, None
    for field, first, last, value in _fields(data, start, end):
        if field == 2:
            kind = value
        elif field == 8:
            name = bytes(data[first:last]).decode(errors="replace")
        elif field in {4, 9, 10} and last > first:
            found = field, first, last - first
    if found is not None:
        field, first, length = found
        width = {4: 4, 10: 8}.get(field) or ONNX_WIDTHS.get(kind, 1)
        yield Region(name, first, length - length % width, width)


def _fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Fields of a message: number, first byte and end of its content, and its value where it is a number."""
    while start < end:
        key, start = _varint(data, start, end)
        field, kind = key >> 3, key & 7
        value = 0
        first = start
        if kind == 0:
            value, last = _varint(data, start, end)
        elif kind == 2:
            length, first = _varint(data, start, end)
            last = first + length
        elif kind in {1, 5}:
            last = start + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if last > end:
            raise ValueError("a field goes beyond its message")
        yield field, first, last, value
        start = last


def _varint(data: Buffer, start: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while start < end and shift < 70:
        byte = data[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
        shift += 7
    raise ValueError("a number without an end")


# -- TFLite: FlatBuffers. Model.subgraphs = 2, buffers = 4; SubGraph.tensors = 0; Tensor.type = 1, buffer = 2, name = 3;
# Buffer.data = 0, offset = 1, size = 2


def _tflite(data: Buffer) -> Iterator[Region]:
    model = _number(data, "<I", 0)
    buffers = list(_tables(data, model, 4))
    seen: set[int] = set()
    for graph in _tables(data, model, 2):
        for tensor in _tables(data, graph, 0):
            index = _scalar(data, tensor, 2, "<I")
            if not 0 < index < len(buffers) or index in seen:
                continue
            seen.add(index)
            start, length = _content(data, buffers[index])
            width = TFLITE_WIDTHS.get(_scalar(data, tensor, 1, "<b"), 1)
            if 0 < length <= len(data) - start:
                yield Region(_text(data, tensor, 3), start, length - length % width, width)


def _content(data: Buffer, buffer: int) -> tuple[int, int]:
    """Where a buffer's bytes begin, and how many there are; large models keep them behind the FlatBuffer."""
    outside, size = _scalar(data, buffer, 1, "<Q"), _scalar(data, buffer, 2, "<Q")
    if outside > 1:
        return outside, size
    place = _field(data, buffer, 0)
    if place is None:
        return 0, 0
    vector = place + _number(data, "<I", place)
    return vector + 4, _number(data, "<I", vector)


def _number(data: Buffer, form: str, place: int) -> int:
    if place < 0:
        raise ValueError("a place before the file")
    return int(struct.unpack_from(form, data, place)[0])


def _field(data: Buffer, table: int, index: int) -> int | None:
    """Where a field of a table lies; None when it has its default."""
    layout = table - _number(data, "<i", table)
    if 4 + 2 * index >= _number(data, "<H", layout):
        return None
    offset = _number(data, "<H", layout + 4 + 2 * index)
    return table + offset if offset else None


def _scalar(data: Buffer, table: int, index: int, form: str) -> int:
    place = _field(data, table, index)
    return 0 if place is None else _number(data, form, place)


def _tables(data: Buffer, table: int, index: int) -> Iterator[int]:
    place = _field(data, table, index)
    if place is None:
        return
    vector = place + _number(data, "<I", place)
    for number in range(min(_number(data, "<I", vector), MOST)):
        entry = vector + 4 + 4 * number
        yield entry + _number(data, "<I", entry)


def _text(data: Buffer, table: int, index: int) -> str:
    place = _field(data, table, index)
    if place is None:
        return ""
    vector = place + _number(data, "<I", place)
    return bytes(data[vector + 4 : vector + 4 + min(_number(data, "<I", vector), 1024)]).decode(errors="replace")
