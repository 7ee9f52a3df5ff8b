"""Encodings of an artifact: pure functions from files to a file, the smallest of several. No database, no MQTT.

What each stretch of the target costs in each form is estimated from its bytes' entropy; zstd then packs what was
chosen. Every encoding ends a zstd block where a plane ends, for planes are unlike one another.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

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
    WINDOW_LOG,
    ZSTD,
    most_operations,
)
from fleet_server.deltas import matching
from fleet_server.deltas.matching import Span

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LEVEL = 19
FLUSH_FROM = 16 * 1024  # bytes of a plane that get zstd blocks of their own
PIECE = 1 << 20
CLOSE = 1.3  # times the best plan's estimate: what is above is not tried
HEAD_BITS = 64  # of an operation's head, packed
CODE = 6  # bits that a byte's place in a code takes
MATCH = 16  # bits that zstd takes for a stretch that repeats, and what ends it
SPARSE_SHARE = 0.3  # of elements that change: beyond it a device would work long for little
Array = npt.NDArray[Any]


class TooManyOperationsError(Exception):
    """A plan is in more pieces than a device takes."""


@dataclass(frozen=True)
class Encoded:
    """One way an artifact may travel: its codec, how it was found, and the file with its bytes."""

    codec: str
    plan: str
    path: Path
    size: int


def encode_full(target: Path, folder: Path) -> Encoded:
    """The smallest encoding without a base."""
    with _mapped(target) as data:
        found = [_packed(folder / "full.zstd", ZSTD, "zstd", [data])]
        found.append(_delta(folder / "full.planes", "planes", None, data, matching.without_base(data)))
    return _smallest(found)


def encode_difference(base: Path, target: Path, folder: Path, *, suffixes_mb: float) -> Encoded:
    """The smallest encoding that needs the base.

    Args:
        base: the artifact that devices hold.
        target: the one they are to get.
        folder: where files may be written.
        suffixes_mb: base and target of at most so many MB are also compared by bsdiff's suffix sort, which takes 17
            times that in memory.

    Raises:
        TooManyOperationsError: when they have too little in common.
    """
    found: list[Encoded] = []
    with _mapped(base) as old, _mapped(target) as new:
        planned: dict[str, list[Span]] = {}
        tensors = matching.by_tensors(old, new)
        if tensors is not None:
            planned["tensors"] = tensors
        if max(len(old), len(new)) <= suffixes_mb * 1e6:
            planned["suffixes"] = matching.by_suffixes(old, new)
        if not planned:
            planned["blocks"] = matching.by_blocks(old, new)
        costs = {name: _cost(old, new, spans) for name, spans in planned.items()}
        for name in sorted(costs, key=costs.__getitem__):
            if not found or costs[name] <= CLOSE * min(costs.values()):
                with suppress(TooManyOperationsError):
                    found.append(_delta(folder / f"difference.{name}", name, old, new, planned[name]))
    if not found:
        raise TooManyOperationsError
    return _smallest(found)


def _cost(old: memoryview, new: memoryview, spans: list[Span]) -> float:
    """About how many bits a plan takes: packing takes long, and most plans are far behind the best."""
    return sum(_bits(part.payloads) + HEAD_BITS for part in _parts(old, new, spans))


def _smallest(found: list[Encoded]) -> Encoded:
    best = min(found, key=lambda one: one.size)
    for one in found:
        if one is not best:
            one.path.unlink()
    return best


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """A file's bytes, that the kernel may drop when memory is short; the map goes with the last array over it."""
    with path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    yield view


@dataclass(frozen=True)
class _Part:
    """One operation."""

    head: tuple[int, int, int, int, int]  # as HEAD, without its skip
    base: int | None
    payloads: tuple[bytes, ...] = ()
    changed: Array | None = None  # of a SPARSE: which elements, and by what
    zigzag: Array | None = None


def _delta(path: Path, plan: str, old: memoryview | None, new: memoryview, spans: list[Span]) -> Encoded:
    return _packed(path, DELTA, plan, _bytes_of(_merged(_parts(old, new, spans)), most_operations(len(new))))


def _bytes_of(parts: Iterator[_Part], most: int) -> Iterator[bytes]:
    at = 0
    for count, part in enumerate(parts):
        if count >= most:
            raise TooManyOperationsError
        operation, width, length, changes, gaps = part.head
        skip = 0 if part.base is None else part.base - at
        yield HEAD.pack(operation, width, length, changes, gaps, skip)
        yield from part.payloads
        if part.base is not None:
            at = part.base + length


def _packed(path: Path, codec: str, plan: str, pieces: Any) -> Encoded:
    """One zstd frame of the pieces; large ones end in a block of their own."""
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: LEVEL,
        zstd.CompressionParameter.window_log: WINDOW_LOG,
    }
    packer = zstd.ZstdCompressor(options=options)
    with path.open("wb") as file:
        for piece in pieces:
            _pack(packer, file, piece)
        file.write(packer.flush())
    return Encoded(codec, plan, path, path.stat().st_size)


def _pack(packer: Any, file: IO[bytes], piece: bytes | memoryview) -> None:
    own = FLUSH_FROM <= len(piece) <= BLOCK
    if own:
        file.write(packer.flush(packer.FLUSH_BLOCK))
    for start in range(0, len(piece), PIECE):
        file.write(packer.compress(piece[start : start + PIECE]))
    if own:
        file.write(packer.flush(packer.FLUSH_BLOCK))


def _parts(old: memoryview | None, new: memoryview, spans: list[Span]) -> Iterator[_Part]:
    """Operations, none larger than a block."""
    at = 0
    for span in spans:
        for first in range(0, span.length, BLOCK):
            length = min(BLOCK, span.length - first)
            base = None if span.base is None else span.base + first
            now = np.frombuffer(new, np.uint8, length, at)
            before = None if base is None or old is None else np.frombuffer(old, np.uint8, length, base)
            yield _cheapest(now, before, base, span.width)
            at += length


def _cheapest(now: Array, before: Array | None, base: int | None, width: int) -> _Part:
    literal = _planes(now.view(f"<u{width}"))
    if before is None or base is None:
        return _Part((LITERAL, width, len(now), 0, 0), None, literal)
    added = _zigzag(now.view(f"<u{width}") - before.view(f"<u{width}"))
    changed = np.flatnonzero(added)
    if not len(changed):
        return _Part((COPY, 1, len(now), 0, 0), base)
    dense = _planes(added)
    found = [
        (_bits(literal), _Part((LITERAL, width, len(now), 0, 0), None, literal)),
        (_bits(dense), _Part((ADD, width, len(now), 0, 0), base, dense)),
    ]
    if len(changed) <= len(added) * SPARSE_SHARE:
        sparse = _sparse(changed, added[changed], len(now), base)
        found.append((_bits(sparse.payloads), sparse))
    return min(found, key=lambda one: one[0])[1]


def _sparse(changed: Array, zigzag: Array, length: int, base: int) -> _Part:
    """Changes of elements at some indices; which of them are negative is apart, for zstd has no code of half a bit."""
    width, one = zigzag.dtype.itemsize, np.asarray(1, zigzag.dtype)
    gaps = _gaps(changed)
    less = zigzag & one
    more = (zigzag >> one) - one + less
    payloads = (gaps, np.packbits(less.astype(np.uint8), bitorder="little").tobytes(), *_planes(more))
    return _Part((SPARSE, width, length, len(changed), len(gaps)), base, payloads, changed, zigzag)


def _zigzag(added: Array) -> Array:
    """Differences modulo 2^n, the small ones of either sign as small numbers."""
    bits = added.dtype.itemsize * 8
    sign = np.zeros_like(added) - (added >> np.asarray(bits - 1, added.dtype))
    found: Array = (added << np.asarray(1, added.dtype)) ^ sign
    return found


def _planes(elements: Array) -> tuple[bytes, ...]:
    width = elements.dtype.itemsize
    split = np.ascontiguousarray(elements).view(np.uint8).reshape(-1, width)
    return tuple(split[:, plane].tobytes() for plane in range(width))


def _gaps(changed: Array) -> bytes:
    """How many elements stay before each that changes."""
    stay = np.diff(changed, prepend=-1) - 1
    jumps, rest = np.divmod(stay, NO_CHANGE)
    found = np.full(int(jumps.sum()) + len(rest), NO_CHANGE, np.uint8)
    found[np.cumsum(jumps + 1) - 1] = rest
    return found.tobytes()


def _bits(payloads: tuple[bytes, ...]) -> float:
    """About what zstd makes of payloads, each with a code of its own.

    That is their entropy, but where one byte stands out zstd has no code below a bit, and a match costs about `MATCH`.
    """
    total = 0.0
    for payload in payloads:
        counts = np.bincount(np.frombuffer(payload, np.uint8), minlength=256)
        counts = counts[counts > 0]
        size = len(payload)
        entropy = float((counts * -np.log2(counts / size)).sum()) + CODE * len(counts)
        total += max(entropy, min(size, MATCH * (size - float(counts.max()))))
    return total


def _merged(parts: Iterator[_Part]) -> Iterator[_Part]:
    """Copies that go on become one, and so do sparse changes, as many as a device takes at once."""
    held: list[_Part] = []
    for part in parts:
        if held and not _goes_on(held, part):
            yield _joined(held)
            held = []
        held.append(part)
    if held:
        yield _joined(held)


def _goes_on(held: list[_Part], part: _Part) -> bool:
    last = held[-1]
    operation, width = part.head[:2]
    if part.head[:2] != last.head[:2] or operation not in {COPY, SPARSE} or part.base is None or last.base is None:
        return False
    if last.base + last.head[2] != part.base or sum(one.head[2] for one in held) + part.head[2] >= 1 << 32:
        return False
    if operation == COPY:
        return True
    tail = BLOCK // width // NO_CHANGE + 1  # gaps that elements behind the last change may need
    changes = sum(one.head[3] for one in held) + part.head[3]
    gaps = sum(one.head[4] + tail for one in held) + part.head[4] + tail
    return changes <= CHANGES and gaps <= GAPS


def _joined(parts: list[_Part]) -> _Part:
    operation, width = parts[0].head[:2]
    length = sum(one.head[2] for one in parts)
    if operation != SPARSE or len(parts) == 1:
        return parts[0] if len(parts) == 1 else _Part((operation, width, length, 0, 0), parts[0].base)
    starts = np.cumsum([0, *(one.head[2] // width for one in parts[:-1])])
    changed = np.concatenate([one.changed + start for one, start in zip(parts, starts, strict=True)])
    return _sparse(changed, np.concatenate([one.zigzag for one in parts]), length, parts[0].base or 0)
