"""Which bytes of the base stand behind which bytes of the target: pure, over files' bytes.

A plan is a row of spans that cover the target. Three ways lead to one: tensors by their names, a suffix sort that
finds what was shifted and changed a little (bsdiff's, for files that fit in memory some times over), and equal blocks
wherever they went.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fleet_server.deltas.tensors import Region, find_regions

BLOCK = 256  # bytes of a block that is looked for
NEAR = 4096  # bytes between tensors that are taken for what was between them before
STEP = 4 << 20  # positions that are hashed at once, at most
FIRST_STEP = 64 << 10  # where something was found just before: more of it is likely near
TABLE_BITS = 24  # at most, of a hash, that a table has an entry for
PRIME = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
INVERSE = pow(PRIME, -1, 1 << 64)
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Span:
    """`length` bytes of the target, in order; `base` is where their like lies in the base, None where it has none."""

    length: int
    base: int | None
    width: int = 1


def by_tensors(base: memoryview, target: memoryview) -> list[Span] | None:
    """Tensor by tensor; what lies between them by blocks. None when the target has no tensors that are known."""
    regions = find_regions(target)
    if not regions:
        return None
    partners = _partners(find_regions(base), regions)
    between = _Blocks(base)
    spans: list[Span] = []
    at = 0
    for region in regions:
        partner = partners.get(region.start)
        gap = region.start - at
        if partner is not None and 0 < gap <= min(partner.start, NEAR):
            spans.append(Span(gap, partner.start - gap))  # what stands before a tensor stands before its partner
        else:
            spans += between.spans(target[at : region.start])
        shared = 0 if partner is None else min(partner.length, region.length)
        if partner is not None and shared:
            spans.append(Span(shared, partner.start, region.width))
        if shared < region.length:
            spans.append(Span(region.length - shared, None, region.width))
        at = region.start + region.length
    return spans + between.spans(target[at:])


def by_blocks(base: memoryview, target: memoryview) -> list[Span]:
    """Equal blocks, wherever they are."""
    return _Blocks(base).spans(target)


def by_suffixes(base: memoryview, target: memoryview) -> list[Span]:
    """What bsdiff finds: stretches that are alike but for some bytes. Takes about 17 times the base in memory."""
    from bsdiff4 import core

    spans: list[Span] = []
    at = 0
    control, _, _ = core.diff(bytes(base), bytes(target))
    for step in range(0, len(control), 24):
        alike, extra, seek = (core.decode_int64(control[place : place + 8]) for place in range(step, step + 24, 8))
        if alike:
            spans.append(Span(alike, at))
        if extra:
            spans.append(Span(extra, None))
        at += alike + seek
    return spans


def without_base(target: memoryview) -> list[Span]:
    """The target alone: its tensors' planes."""
    spans: list[Span] = []
    at = 0
    for region in find_regions(target):
        if region.start > at:
            spans.append(Span(region.start - at, None))
        spans.append(Span(region.length, None, region.width))
        at = region.start + region.length
    return [*spans, Span(len(target) - at, None)] if at < len(target) else spans


def _partners(base: list[Region], target: list[Region]) -> dict[int, Region]:
    """For each region of the target, by its start, that of the base: of the same name, else the next of its size."""
    named = {(one.name, one.width): one for one in base if one.name}
    found = {one.start: named[one.name, one.width] for one in target if (one.name, one.width) in named}
    taken = {one.start for one in found.values()}
    free: dict[tuple[int, int], list[Region]] = {}
    for one in reversed(base):
        if one.start not in taken:
            free.setdefault((one.length, one.width), []).append(one)
    for one in target:
        alike = free.get((one.length, one.width))
        if one.start not in found and alike:
            found[one.start] = alike.pop()
    return found


class _Blocks:
    """Finds blocks of a base at any place of a target.

    A block's hash is a polynomial modulo 2^64, taken of every position of the target by running sums.
    """

    def __init__(self, base: memoryview) -> None:
        self._base = np.frombuffer(base, np.uint8)
        self._known: tuple[Array, Array, Array] | None = None

    def spans(self, target: memoryview) -> list[Span]:
        """The target in spans that the base has, and that it has not."""
        new, spans, at, first, step = np.frombuffer(target, np.uint8), [], 0, 0, FIRST_STEP
        while first + BLOCK <= len(new):
            places, starts = self._hits(new[first : first + step + BLOCK - 1])
            index, found_until = 0, at
            while index < len(places):
                place, start = first + int(places[index]), int(starts[index])
                before = _alike(new[at:place][::-1], self._base[:start][::-1])
                length = before + _alike(new[place:], self._base[start:])
                if length < BLOCK:
                    index += 1  # only its hash was the same
                    continue
                if place - before > at:
                    spans.append(Span(place - before - at, None))
                spans.append(Span(length, start - before))
                at = place - before + length
                index = int(np.searchsorted(places, at - first))
            first = max(first + step, at)
            step = FIRST_STEP if at > found_until else min(step * 2, STEP)
        return [*spans, Span(len(new) - at, None)] if at < len(new) else spans

    def _hits(self, new: Array) -> tuple[Array, Array]:
        """Places where a block of the base may lie, ascending, and where in the base each begins."""
        if self._known is None:
            self._known = self._hashes()
        hashes, starts, table = self._known
        if not len(hashes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        found = _rolling(new)
        places = np.flatnonzero(table[_slots(found, table)])  # few are left for the search, which takes far longer
        found = found[places]
        slots = np.minimum(np.searchsorted(hashes, found), len(hashes) - 1)
        same = hashes[slots] == found
        return places[same], starts[slots[same]]

    def _hashes(self) -> tuple[Array, Array, Array]:
        """Of the base's blocks, sorted, and where they begin; and which slots of a table some hash falls into."""
        count = len(self._base) // BLOCK
        powers = _powers(BLOCK)
        found = np.empty(count, np.uint64)
        for first in range(0, count, STEP // BLOCK):
            part = self._base[first * BLOCK : min(count, first + STEP // BLOCK) * BLOCK].reshape(-1, BLOCK)
            found[first : first + len(part)] = (part.astype(np.uint64) * powers).sum(1, dtype=np.uint64)
        order = np.argsort(found, kind="stable")
        table = np.zeros(1 << min(TABLE_BITS, count.bit_length() + 4), np.bool_)
        table[_slots(found, table)] = True
        return found[order], order * BLOCK, table


def _slots(hashes: Array, table: Array) -> Array:
    """Where hashes fall in a table, by their highest bits: all of a block's bytes are in those."""
    return hashes >> np.uint64(65 - len(table).bit_length())


def _powers(count: int) -> Array:
    factors = np.full(count, PRIME, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _rolling(data: Array) -> Array:
    """The hash of the block at each position."""
    sums = np.concatenate(([np.uint64(0)], np.cumsum(data.astype(np.uint64) * _powers(len(data)), dtype=np.uint64)))
    back = np.full(len(data) - BLOCK + 1, INVERSE, np.uint64)
    back[0] = 1
    found: Array = (sums[BLOCK:] - sums[:-BLOCK]) * np.multiply.accumulate(back)
    return found


def _alike(one: Array, other: Array) -> int:
    """How many bytes are the same from the start on."""
    length, at, step = min(len(one), len(other)), 0, 4096
    while at < length:
        differs = one[at : min(length, at + step)] != other[at : min(length, at + step)]
        first = int(differs.argmax()) if differs.any() else -1
        if first >= 0:
            return at + first
        at, step = at + step, min(step * 2, STEP)
    return length
