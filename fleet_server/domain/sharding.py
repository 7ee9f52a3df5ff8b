"""Pure: what a device can take of a model that is cut into stages, and which one takes over a lost stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIB = 2**20
# Of a device's memory, where its profile says nothing: a runtime may keep weights twice, and others live there too.
MEMORY_SHARE = 0.25
# Bytes a second by kind of link: what such a link gives most of the time, not at best.
LINK_BYTES_S: Mapping[str, float] = {"ethernet": 50e6, "wifi": 5e6, "cellular": 0.5e6, "unknown": 5e6}


@dataclass(frozen=True)
class Capacity:
    """What a device gives to a stage.

    Attributes:
        device: its id.
        memory: bytes of weights and activations.
        speed: relative to the server.
        bytes_per_s: of its link.
    """

    device: str
    memory: float
    speed: float
    bytes_per_s: float


@dataclass(frozen=True)
class Need:
    """What a stage takes: bytes of memory, seconds a row on the server, bytes a row in and out."""

    memory: int
    row_s: float
    row_bytes: int

    def seconds(self, device: Capacity) -> float:
        """Of a row on a device."""
        return self.row_s / device.speed + self.row_bytes / device.bytes_per_s


def memory_of(facts_mb: int, budget_mb: float | None, given_mb: float | None) -> float:
    """Bytes that a stage may take: the tighter of what was asked and the profile's budget, else a share of all."""
    bounds = [one for one in (budget_mb, given_mb) if one is not None]
    return (min(bounds) if bounds else facts_mb * MEMORY_SHARE) * MIB


def taken_over(lost: Sequence[Need], spares: Sequence[Capacity]) -> list[str] | None:
    """A device for each lost stage, each its own, so that the slowest of them is as fast as can be.

    Returns:
        Ids in the order of the stages; None where the spare devices can't hold them all.
    """
    costs = [[one.seconds(spare) if one.memory <= spare.memory else None for spare in spares] for one in lost]
    bounds = sorted({cost for row in costs for cost in row if cost is not None})
    low, high = 0, len(bounds)
    best: list[int] | None = None
    while low < high:
        middle = (low + high) // 2
        found = _matched([[cost is not None and cost <= bounds[middle] for cost in row] for row in costs])
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return None if best is None else [spares[one].device for one in best]


def _matched(fits: Sequence[Sequence[bool]]) -> list[int] | None:
    """A spare for every stage by augmenting paths; None where there is no such matching."""
    holder: dict[int, int] = {}

    def place(stage: int, seen: set[int]) -> bool:
        for spare, fit in enumerate(fits[stage]):
            if fit and spare not in seen:
                seen.add(spare)
                if spare not in holder or place(holder[spare], seen):
                    holder[spare] = stage
                    return True
        return False

    if not all(place(stage, set()) for stage in range(len(fits))):
        return None
    return [spare for _, spare in sorted((stage, spare) for spare, stage in holder.items())]
