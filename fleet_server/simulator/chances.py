"""What is left to chance, the same with every run of a seed. Pure.

Each thing that is drawn has a stream of its own, named by the fleet's seed, the device and a purpose, so that what one
device does changes nothing of another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import IntEnum

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.protocol.histogram import GROWTH
from agent.protocol.limits import LIMITS

_EDGES: NDArray[np.float64] = np.power(GROWTH, np.arange(LIMITS.histogram_buckets, dtype=np.float64))


class Purpose(IntEnum):
    """What a stream of chance is for."""

    PLACING = 0
    TRAITS = 1
    LIFE = 2
    TRAFFIC = 3
    FAULTS = 4
    EFFECTS = 5
    VERSION = 6
    COMMANDS = 7
    SAMPLES = 8


class Distribution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a number comes from; exactly one of these.

    Attributes:
        uniform: the smallest and the largest.
        normal: mean and standard deviation.
        lognormal: median, and the standard deviation of the logarithm.
        choice: any of these.
    """

    uniform: tuple[float, float] | None = None
    normal: tuple[float, float] | None = None
    lognormal: tuple[float, float] | None = None
    choice: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of uniform, normal, lognormal and choice, not {len(given)}")
        if self.choice is not None and not self.choice:
            raise ValueError("choice is empty")
        if self.lognormal is not None and (self.lognormal[0] <= 0 or self.lognormal[1] < 0):
            raise ValueError("lognormal has a median above 0, and a deviation of 0 or more")
        if self.normal is not None and self.normal[1] < 0:
            raise ValueError("normal has a deviation of 0 or more")
        if self.uniform is not None and self.uniform[0] > self.uniform[1]:
            raise ValueError("uniform has the smaller number first")


Number = float | Distribution


def stream(seed: int, device: int, purpose: Purpose, *further: int) -> np.random.Generator:
    """A stream of chance."""
    return np.random.default_rng((seed, device, purpose, *further))


def draw(number: Number, chance: np.random.Generator) -> float:
    """A number as it is, or drawn."""
    if not isinstance(number, Distribution):
        return number
    if number.uniform is not None:
        return float(chance.uniform(*number.uniform))
    if number.normal is not None:
        return float(chance.normal(*number.normal))
    if number.lognormal is not None:
        median, deviation = number.lognormal
        return median * math.exp(deviation * float(chance.standard_normal()))
    assert number.choice is not None
    return float(chance.choice(number.choice))


def drawn(number: Number) -> float:
    """A number of one device, whose distributions were drawn from."""
    assert not isinstance(number, Distribution)
    return float(number)


def histogram(seconds: NDArray[np.float64]) -> dict[int, int]:
    """How many durations fall into each bucket of `agent.protocol.histogram`, as its `bucket_of` puts each."""
    buckets = np.minimum(np.searchsorted(_EDGES, seconds * 1e6, side="left"), LIMITS.histogram_buckets - 1)
    found, counts = np.unique(buckets, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def shares(total: int, wanted: Iterable[float]) -> list[int]:
    """A number divided by shares, exactly: what is left over goes to the largest remainders."""
    weights = list(wanted)
    exact = [total * one / sum(weights) for one in weights]
    counts = [math.floor(one) for one in exact]
    order = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts
