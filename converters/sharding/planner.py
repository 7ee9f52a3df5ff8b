"""Pure: where a chain of nodes is cut and which device gets which stage: the slowest stage decides.

Every stage works at once, on micro-batches, so what counts is the slowest: its compute plus the bytes that it takes in
and gives out over its device's link. Stages are runs of the graph's own order; all cuts of it and all choices of
devices are looked at, by dynamic programming over sets of devices (docs/decisions/030).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
POSITIONS_LIMIT = 400
STAGES_LIMIT = 8
DEVICES_LIMIT = 10


class NoPlanError(Exception):
    """No cut fits; the message says what is in the way and what would help."""


@dataclass(frozen=True)
class Chain:
    """A net as a row of nodes. A position p stands before node p; `len(seconds)` is the end.

    Attributes:
        seconds: (nodes,) of compute for one row, on the machine that measured them.
        live: (nodes,) bytes a row that are held while a node runs: of tensors that are still needed.
        weights: bytes of each weight, with the ascending nodes that use it.
        crossing: (nodes + 1,) bytes a row that pass a position: inputs at 0, outputs at the end, infinity where it
            can't be cut.
    """

    seconds: Floats
    live: Floats
    weights: tuple[tuple[int, tuple[int, ...]], ...]
    crossing: Floats


@dataclass(frozen=True)
class Place:
    """A device that may have a stage.

    Attributes:
        device: its id.
        memory: bytes that a stage may take.
        speed: relative to the machine that measured the chain; 2 is twice as fast.
        bytes_per_s: of its link.
    """

    device: str
    memory: float
    speed: float
    bytes_per_s: float


@dataclass(frozen=True)
class Stage:
    """A run of nodes on a device.

    Attributes:
        start: its first node.
        end: the node after its last.
        device: that has it.
        compute_s: for one row on that device.
        weight_bytes: of the weights that it uses.
        activation_bytes: held at most, for all rows of a micro-batch.
        bytes_in: that one row brings.
        bytes_out: that one row sends on.
        transfer_s: both over the device's link, for one row.
    """

    start: int
    end: int
    device: str
    compute_s: float
    weight_bytes: int
    activation_bytes: int
    bytes_in: int
    bytes_out: int
    transfer_s: float

    @property
    def seconds(self) -> float:
        """Of one row."""
        return self.compute_s + self.transfer_s

    @property
    def memory(self) -> int:
        """Bytes of weights and activations."""
        return self.weight_bytes + self.activation_bytes


def plan(chain: Chain, places: Sequence[Place], stages: int | None, rows: int = 1) -> tuple[Stage, ...]:
    """Cut a chain for devices.

    Args:
        chain: of the net.
        places: devices to choose from; each has one stage at most.
        stages: how many; None for the fewest that fit.
        rows: of a micro-batch, whose activations a device holds.

    Raises:
        NoPlanError: when the net can't be cut so, or no choice of devices holds it.
    """
    if stages is not None and not 1 <= stages <= STAGES_LIMIT:
        raise NoPlanError(f"stages: {stages} were asked for; a net is cut into 1 to {STAGES_LIMIT}")
    if stages is not None and stages > len(places):
        raise NoPlanError(f"stages: {stages} stages need {stages} devices, and {len(places)} can be had")
    positions = _positions(chain)
    if stages is not None and len(positions) - 1 < stages:
        raise NoPlanError(f"stages: it can be cut at {len(positions) - 2} places, which makes no {stages} stages")
    costs = _Costs(chain, positions, rows)
    kept = shortlist(places)
    counts = (stages,) if stages is not None else range(1, min(len(kept), len(positions) - 1, STAGES_LIMIT) + 1)
    for count in counts:
        found = _best(costs, kept, count)
        if found is not None:
            return found
    raise NoPlanError(_why_not(costs, kept, stages))


def shortlist(places: Sequence[Place]) -> list[Place]:
    """The devices worth looking at: of those that are alike no more than stages, then the fastest and the largest."""
    alike: dict[tuple[float, float, float], list[Place]] = {}
    for place in places:
        alike.setdefault((place.memory, place.speed, place.bytes_per_s), []).append(place)
    kept = [place for group in alike.values() for place in group[:STAGES_LIMIT]]
    if len(kept) <= DEVICES_LIMIT:
        return kept
    fast = sorted(kept, key=lambda one: (-one.speed, -one.memory))[: DEVICES_LIMIT // 2]
    rest = [one for one in kept if one not in fast]
    return fast + sorted(rest, key=lambda one: (-one.memory, -one.speed))[: DEVICES_LIMIT - len(fast)]


def _positions(chain: Chain) -> list[int]:
    """Where it may be cut, with both ends; of very many, of each share of the compute the one with the fewest bytes."""
    end = len(chain.seconds)
    inner = [int(place) for place in np.flatnonzero(np.isfinite(chain.crossing)) if 0 < place < end]
    if len(inner) > POSITIONS_LIMIT:
        done = np.cumsum(chain.seconds)
        total = float(done[-1]) or 1.0
        best: dict[int, int] = {}
        for place in inner:
            share = int(POSITIONS_LIMIT * done[place - 1] / total)
            if share not in best or chain.crossing[place] < chain.crossing[best[share]]:
                best[share] = place
        inner = sorted(best.values())
    return [0, *inner, end]


class _Costs:
    """What every run between two positions costs: matrices by (start, end), infinite below the diagonal."""

    def __init__(self, chain: Chain, positions: list[int], rows: int) -> None:
        self.positions = positions
        count = len(positions)
        self.valid = np.triu(np.ones((count, count), dtype=bool), 1)
        done = np.concatenate([[0.0], np.cumsum(chain.seconds)])[positions]
        self.compute: Floats = done[None, :] - done[:, None]
        self.weights = _weights(chain, positions)
        self.activations = _activations(chain, positions) * rows
        self.crossing: Floats = chain.crossing[positions]
        self.bytes: Floats = self.crossing[:, None] + self.crossing[None, :]

    def seconds(self, place: Place) -> Floats:
        """Of one row on a device; infinite where it has not the memory."""
        fits = self.valid & (self.weights + self.activations <= place.memory)
        return np.where(fits, self.compute / place.speed + self.bytes / place.bytes_per_s, np.inf)

    def stage(self, start: int, end: int, place: Place) -> Stage:
        """The run between two of the positions on a device."""
        return Stage(
            start=self.positions[start],
            end=self.positions[end],
            device=place.device,
            compute_s=float(self.compute[start, end]) / place.speed,
            weight_bytes=int(self.weights[start, end]),
            activation_bytes=int(self.activations[start, end]),
            bytes_in=int(self.crossing[start]),
            bytes_out=int(self.crossing[end]),
            transfer_s=float(self.bytes[start, end]) / place.bytes_per_s,
        )


def _segment_of(node: int, positions: list[int]) -> int:
    return int(np.searchsorted(positions, node, side="right")) - 1


def _weights(chain: Chain, positions: list[int]) -> Floats:
    """Bytes of weights of every run; one that several nodes of a run use counts once."""
    count = len(positions)
    added = np.zeros((count, count))
    for size, users in chain.weights:
        before = -1
        for segment in sorted({_segment_of(node, positions) for node in users}):
            added[before + 1 : segment + 1, segment + 1] += size  # runs in which it is the first user
            before = segment
    total: Floats = np.cumsum(added, axis=1)
    return total


def _activations(chain: Chain, positions: list[int]) -> Floats:
    """Most bytes a row that every run holds at once."""
    count = len(positions)
    peaks = [float(chain.live[start:end].max()) for start, end in itertools.pairwise(positions)]
    found = np.zeros((count, count))
    for start in range(count - 1):
        found[start, start + 1 :] = np.maximum.accumulate(peaks[start:])
    return found


def _best(costs: _Costs, places: list[Place], count: int) -> tuple[Stage, ...] | None:
    """The stages whose slowest is fastest, on `count` of the devices; None where none fits."""
    matrices = [costs.seconds(place) for place in places]
    start = np.full(len(costs.positions), np.inf)
    start[0] = 0.0
    # By set of devices: the slowest stage of the best way to each position, and how it came there.
    ways: dict[frozenset[int], tuple[Floats, dict[int, npt.NDArray[np.intp]]]] = {frozenset(): (start, {})}
    sets: list[frozenset[int]] = [frozenset()]
    for _ in range(count):
        following: dict[frozenset[int], tuple[Floats, dict[int, npt.NDArray[np.intp]]]] = {}
        for used in sets:
            for device in set(range(len(places))) - used:
                slowest = np.maximum(ways[used][0][:, None], matrices[device])
                came = slowest.argmin(axis=0)
                value = slowest[came, np.arange(len(came))]
                bigger = used | {device}
                best, froms = following.setdefault(bigger, (np.full(len(came), np.inf), {}))
                better = value < best
                best[better] = value[better]
                froms[device] = np.where(better, came, -1)
                for other in froms:
                    if other != device:
                        froms[other][better] = -1
        ways.update(following)
        sets = list(following)
    winner = min(sets, key=lambda one: ways[one][0][-1], default=None)
    if winner is None or not np.isfinite(ways[winner][0][-1]):
        return None
    found: list[Stage] = []
    place = len(costs.positions) - 1
    while winner:
        device = next(one for one, came in ways[winner][1].items() if came[place] >= 0)
        before = int(ways[winner][1][device][place])
        found.append(costs.stage(before, place, places[device]))
        winner, place = winner - {device}, before
    return tuple(reversed(found))


def _why_not(costs: _Costs, places: list[Place], stages: int | None) -> str:
    need = costs.weights + costs.activations
    steps = [float(need[index, index + 1]) for index in range(len(costs.positions) - 1)]
    smallest, largest = max(steps), max(place.memory for place in places)
    if smallest > largest:
        return (
            f"memory: a piece of the net that can't be cut needs {_mib(smallest)}, and the largest device gives "
            f"{_mib(largest)}: free memory there, or take smaller micro-batches"
        )
    asked = f"{stages} stages" if stages is not None else f"up to {STAGES_LIMIT} stages"
    total = sum(sorted((place.memory for place in places), reverse=True)[: stages or STAGES_LIMIT])
    return (
        f"memory: no cut into {asked} fits these devices: the net needs {_mib(float(need[0, -1]))}, the largest give "
        f"{_mib(total)} together: take more stages, more devices, or a quantized version"
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
