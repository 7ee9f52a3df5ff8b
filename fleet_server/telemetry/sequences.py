"""Sets of a spool's sequences as ranges: small, because a spool counts by one and sends the oldest first. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import msgspec

RANGES = 4096  # of one spool; only one that skips numbers without end has more
_FLAT = msgspec.msgpack.Decoder(list[int])


class Sequences:
    """A set of whole numbers.

    Where there are more than `RANGES` ranges the lowest grow together: what lies between them counts as in the set.
    A spool sends the oldest first, so that what it left out below is not to come any more.
    """

    def __init__(self, packed: bytes = b"") -> None:
        flat = _FLAT.decode(packed) if packed else []
        self._first, self._last = flat[0::2], flat[1::2]

    def __contains__(self, number: int) -> bool:
        at = bisect.bisect_right(self._first, number) - 1
        return at >= 0 and number <= self._last[at]

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self.ranges)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First and last number of each range, both included, in order."""
        return list(zip(self._first, self._last, strict=True))

    def add(self, numbers: Iterable[int]) -> None:
        """Take numbers in."""
        merged: list[list[int]] = []
        for first, last in sorted([*self.ranges, *((one, one) for one in numbers)]):
            if merged and first <= merged[-1][1] + 1:
                merged[-1][1] = max(merged[-1][1], last)
            else:
                merged.append([first, last])
        beyond = len(merged) - RANGES
        if beyond > 0:
            merged[: beyond + 1] = [[merged[0][0], merged[beyond][1]]]
        self._first, self._last = [one[0] for one in merged], [one[1] for one in merged]

    def packed(self) -> bytes:
        """As bytes of a row."""
        return msgspec.msgpack.encode([number for one in self.ranges for number in one])
