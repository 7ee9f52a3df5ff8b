"""Decoders: from an encoding's file, and the base's, to the artifact's bytes. Standard library and zstd only.

Memory is bounded whatever the artifact's size, and nothing is believed: a wrong encoding ends in a `DecodeError`, and
never in more bytes than were said. Whether the bytes are right, the artifact's digest says: that is the caller's part.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from agent.protocol.delta import (
    ADD,
    BLOCK,
    CHANGES,
    COPY,
    DELTA,
    GAPS,
    HEAD,
    LITERAL,
    NO_CHANGE,
    SPARSE,
    WIDTHS,
    WINDOW_LOG,
    ZSTD,
    most_operations,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

READ = 64 * 1024
SLICE = 64 * 1024  # bytes of arithmetic at once: Python's large integers are copied at every step
CELLS: dict[int, Any] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class DecodeError(Exception):
    """An encoding is damaged, or none of what it says it is."""


def decode(codec: str, encoded: int, base: int | None, target: int, size: int) -> None:
    """Write an artifact.

    Args:
        codec: of the encoding.
        encoded: descriptor of the encoding's file.
        base: descriptor of the base's file; None where it has none.
        target: descriptor of an empty file that is written from its start.
        size: bytes that the artifact has; no more are written.

    Raises:
        DecodeError: when the encoding can't be what it says.
        OSError: when a file can't be read or written.
        MemoryError: when the device has not enough.
    """
    stream = _Stream(encoded)
    if codec == ZSTD:
        left = size
        while left:
            piece = stream.read(min(left, READ))
            _write(target, piece)
            left -= len(piece)
    elif codec == DELTA:
        _Delta(stream, base, target, size).run()
    else:
        raise DecodeError(f"there is no decoder for {codec!r}")
    stream.check_end()


class _Stream:
    """The bytes of one zstd frame."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._inflate = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})

    def read(self, count: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            DecodeError: when there are fewer.
        """
        first = self._some(count)
        if len(first) == count:
            return first
        pieces, left = [first], count - len(first)
        while left:
            pieces.append(self._some(left))
            left -= len(pieces[-1])
        return b"".join(pieces)

    def _some(self, most: int) -> bytes:
        """At least one byte, where one was asked for."""
        found = b""
        while most and not found:
            if self._inflate.eof:
                raise DecodeError("it ends early")
            fed = b""
            if self._inflate.needs_input:
                fed = os.read(self._file, READ)
                if not fed:
                    raise DecodeError("it is cut off")
            found = self._decompress(fed, most)
        return found

    def check_end(self) -> None:
        """Nothing may follow.

        Raises:
            DecodeError: when something does.
        """
        while not self._inflate.eof:
            fed = os.read(self._file, READ) if self._inflate.needs_input else b""
            if self._decompress(fed, 1):
                raise DecodeError("it makes more bytes than the artifact has")
            if not fed and self._inflate.needs_input and not self._inflate.eof:
                raise DecodeError("it is cut off")
        if self._inflate.unused_data or os.read(self._file, 1):
            raise DecodeError("something follows its end")

    def _decompress(self, fed: bytes, most: int) -> bytes:
        try:
            return self._inflate.decompress(fed, most)
        except zstd.ZstdError as error:
            raise DecodeError(str(error)) from None


class _Delta:
    """Carries out the operations of a difference."""

    def __init__(self, stream: _Stream, base: int | None, target: int, size: int) -> None:
        self._stream = stream
        self._base = base
        self._base_size = 0 if base is None else os.fstat(base).st_size
        self._at = 0  # in the base
        self._target = target
        self._left = size
        self._operations = most_operations(size)

    def run(self) -> None:
        """All of them."""
        steps: dict[int, Callable[[int, int, int, int], None]] = {
            COPY: self._copy,
            LITERAL: self._literal,
            ADD: self._add,
            SPARSE: self._sparse,
        }
        while self._left:
            operation, width, length, changes, gaps, skip = HEAD.unpack(self._stream.read(HEAD.size))
            self._operations -= 1
            self._check(operation, width, length, skip)
            steps[operation](width, length, changes, gaps)
            self._left -= length

    def _check(self, operation: int, width: int, length: int, skip: int) -> None:
        if operation > SPARSE or width not in WIDTHS or length % width or self._operations < 0:
            raise DecodeError("it holds an operation that there is not")
        if not 0 < length <= self._left:
            raise DecodeError("it makes more bytes than the artifact has")
        if operation in {LITERAL, ADD} and length > BLOCK:
            raise DecodeError("it holds too large an operation")
        if operation != LITERAL:
            self._at += skip
            if self._at < 0 or self._at + length > self._base_size:
                raise DecodeError("it takes bytes that the base does not have")

    def _take(self, length: int) -> bytes:
        """The next bytes of the base."""
        assert self._base is not None  # or else it has no bytes, which was checked
        found = os.pread(self._base, length, self._at)
        if len(found) != length:
            raise DecodeError("the base ends early")
        self._at += length
        return found

    def _copy(self, _width: int, length: int, _changes: int, _gaps: int) -> None:
        for part in _parts(length, BLOCK):
            _write(self._target, self._take(part))

    def _literal(self, width: int, length: int, _changes: int, _gaps: int) -> None:
        _write(self._target, _together(self._stream.read(length), width))

    def _add(self, width: int, length: int, _changes: int, _gaps: int) -> None:
        added = memoryview(_together(self._stream.read(length), width))
        for start in range(0, length, SLICE):
            part = added[start : start + SLICE]
            _write(self._target, _sum(self._take(len(part)), part, width))

    def _sparse(self, width: int, length: int, changes: int, gaps: int) -> None:
        if not 0 < changes <= min(CHANGES, length // width) or not changes <= gaps <= GAPS:
            raise DecodeError("it holds an impossible number of changes")
        where = self._stream.read(gaps)
        if gaps - where.count(NO_CHANGE) != changes:
            raise DecodeError("its gaps are none of so many changes")
        less = self._stream.read((changes + 7) // 8)
        more: Any = memoryview(_together(self._stream.read(changes * width), width)).cast(CELLS[width])
        top = (1 << (8 * width)) - 1
        places = _places(where)
        place, change, first = next(places), 0, 0
        for part in _parts(length, SLICE):
            block = bytearray(self._take(part))
            cells, end = memoryview(block).cast(CELLS[width]), first + part // width
            while place < end:
                much = more[change] + 1
                old = cells[place - first]
                cells[place - first] = (old - much if less[change >> 3] >> (change & 7) & 1 else old + much) & top
                change += 1
                place = next(places, length)
            cells.release()
            _write(self._target, block)
            first = end
        if change != changes:
            raise DecodeError("it changes elements beyond its end")


def _places(gaps: bytes) -> Iterator[int]:
    """The indices of elements that change."""
    place = 0
    for gap in gaps:
        place += gap
        if gap != NO_CHANGE:
            yield place
            place += 1


def _together(planes: bytes, width: int) -> bytes | bytearray:
    """Elements of their planes."""
    if width == 1:
        return planes
    count = len(planes) // width
    found = bytearray(len(planes))
    for plane in range(width):
        found[plane::width] = planes[plane * count : (plane + 1) * count]
    return found


def _sum(base: bytes, zigzag: memoryview, width: int) -> bytes:
    """Element by element, by arithmetic on all of them as one large integer: no carry leaves its element."""
    bits = 8 * width
    ones, tops, rest = _masks(len(base) // width, width)
    z = int.from_bytes(zigzag, "little")
    odd = z & ones
    added = ((z >> 1) & rest) ^ ((odd << bits) - odd)
    old = int.from_bytes(base, "little")
    new = ((old & rest) + (added & rest)) ^ ((old ^ added) & tops)
    return new.to_bytes(len(base), "little")


@lru_cache(2)
def _masks(count: int, width: int) -> tuple[int, int, int]:
    """Of each element, as one integer: its lowest bit, its highest, and all but that."""
    bits = 8 * width
    ones = int.from_bytes((b"\1" + bytes(width - 1)) * count, "little")
    tops = ones << (bits - 1)
    return ones, tops, (ones << bits) - ones ^ tops


def _parts(length: int, most: int) -> Iterator[int]:
    while length:
        part = min(length, most)
        yield part
        length -= part


def _write(target: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
