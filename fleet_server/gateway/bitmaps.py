"""Sets of chunks as whole numbers, a bit a chunk: joining two sets of 16,000 chunks takes a microsecond. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from agent.protocol.messages import ChunkRange


def from_ranges(ranges: Iterable[ChunkRange]) -> int:
    """The chunks of some ranges."""
    found = 0
    for span in ranges:
        found |= ((1 << (span.last - span.first + 1)) - 1) << span.first
    return found


def members(bitmap: int) -> Iterator[int]:
    """The chunks of a set, lowest first."""
    if not bitmap:
        return
    base = lowest(bitmap)
    rest = bitmap >> base  # what lies close together is then a small number
    while rest:
        bit = rest & -rest
        yield base + bit.bit_length() - 1
        rest ^= bit


def lowest(bitmap: int) -> int:
    """The lowest chunk of a set that is not empty."""
    return (bitmap & -bitmap).bit_length() - 1


def first_from(bitmap: int, start: int, count: int) -> int:
    """At most `count` chunks of a set, in the order of a circle that begins at `start`."""
    found = 0
    for part in (bitmap >> start << start, bitmap & ((1 << start) - 1)):
        for chunk in members(part):
            if count <= 0:
                return found
            found |= 1 << chunk
            count -= 1
    return found
