"""A bounded choice out of a stream without an end, in which the unsure is more likely than the sure. Pure.

Weighted sampling without replacement by Efraimidis and Spirakis (Information Processing Letters 97, 2006): each row
gets the key `u ** (1 / w)`, with `u` even between 0 and 1 and `w` its weight, and the rows with the largest keys stay.
Here keys are logarithms, `log(u) / w`, and a weight is the odds that the answer is wrong, as the model itself has them.
A key is made once and goes with its row, so that the choice out of two choices is that out of both streams: the worker
chooses in memory, the supervisor among that and what it has, and a restart changes nothing.

Where bytes are what is short, those with the smallest keys go, whatever their size.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

ValueT = TypeVar("ValueT")
SUREST = 1 - 1e-9
LEAST_SURE = 1e-9


def key_of(confidence: float, chance: float) -> float:
    """The key of a row; the largest stay.

    Args:
        confidence: of its answer, 0 to 1.
        chance: even between 0 and 1.
    """
    sure = min(max(confidence, LEAST_SURE), SUREST)
    return math.log(max(chance, 5e-324)) * sure / (1 - sure)


@dataclass(frozen=True, order=True)
class Entry(Generic[ValueT]):
    """Something in a reservoir: its key, its bytes, and when it came, in Unix seconds."""

    key: float
    number: int
    size: int = field(compare=False)
    at: float = field(compare=False)
    value: ValueT = field(compare=False)


class Reservoir(Generic[ValueT]):
    """What is chosen.

    Args:
        most: how many.
        most_bytes: of all of them together.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._entries: list[Entry[ValueT]] = []  # the smallest key first
        self._number = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry[ValueT]]:
        return iter(tuple(self._entries))

    def admits(self, key: float) -> bool:
        """Whether one with this key could stay, for its number: what would not need not be made."""
        return len(self._entries) < self._most or (self._most > 0 and key > self._entries[0].key)

    def add(self, key: float, size: int, at: float, value: ValueT) -> list[Entry[ValueT]]:
        """Let one in; those that had to go for it, which may be itself."""
        self._number += 1
        insort(self._entries, Entry(key, -self._number, size, at, value))  # of equal keys the first stays
        self.bytes += size
        return self._fitted()

    def bound(self, most: int, most_bytes: int) -> list[Entry[ValueT]]:
        """From now on so many; those that had to go."""
        self._most, self._most_bytes = most, most_bytes
        return self._fitted()

    def lowest(self) -> Entry[ValueT] | None:
        """What would go first."""
        return self._entries[0] if self._entries else None

    def drop(self, unwanted: Callable[[Entry[ValueT]], bool]) -> list[Entry[ValueT]]:
        """Let some go."""
        gone = [one for one in self._entries if unwanted(one)]
        self._entries = [one for one in self._entries if not unwanted(one)]
        self.bytes -= sum(one.size for one in gone)
        return gone

    def _fitted(self) -> list[Entry[ValueT]]:
        gone = []
        while self._entries and (len(self._entries) > self._most or self.bytes > self._most_bytes):
            gone.append(self._entries.pop(0))
            self.bytes -= gone[-1].size
        return gone
