"""How much of each group of channels to remove: pure arithmetic over measured sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STEP = 1 / 16
HIGHEST = 0.9
# Vector units take channels in blocks: what is no multiple of one falls back to a slower kernel. ONNX Runtime's blocks
# are 16 wide with AVX-512 and 8 with AVX2 and NEON; narrow layers would lose too much by 16.
ROUND_TO = 8
WIDE = 64
ROUND_WIDE_TO = 16
LEAST_CHANNELS = 4
# At one row a layer waits for its weights as well as for its sums: a core multiplies about so often while it fetches
# one (100 billion sums a second beside 20 GB/s). Counted, not timed: a seed must give the same net on a busy machine.
SUMS_PER_WEIGHT = 20.0
# Share of a net's time that stays however few channels it has: layers begin and end, inputs are read, and layers that
# look at each channel alone wait for memory. Seen of nets at half their cost: 0.02 (ResNet-18) and 0.05 (MobileNetV2).
FIXED_SHARE = 0.06


@dataclass(frozen=True)
class Layer:
    """One layer's work.

    Attributes:
        macs: multiply-accumulates of one row, before anything is removed.
        gives: the group whose channels it gives; None when those stay.
        takes: the group whose channels it takes; None when those stay, or when they are the ones it gives.
        weights: numbers in it, before anything is removed.
    """

    macs: float
    gives: str | None
    takes: str | None
    weights: float = 0.0


def work(layers: Sequence[Layer], ratios: Mapping[str, float]) -> float:
    """Multiply-accumulates that are left when a ratio of each group's channels is removed."""
    return sum(layer.macs * _left(layer, ratios) for layer in layers)


def cost(layers: Sequence[Layer], ratios: Mapping[str, float]) -> float:
    """What is left of the time that one row takes, in multiply-accumulates: those, and weights to be fetched.

    After the roofline of Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785, with both parts added.
    """
    return sum((layer.macs + SUMS_PER_WEIGHT * layer.weights) * _left(layer, ratios) for layer in layers)


def _left(layer: Layer, ratios: Mapping[str, float]) -> float:
    given = 1 - ratios.get(layer.gives, 0.0) if layer.gives else 1.0
    taken = 1 - ratios.get(layer.takes, 0.0) if layer.takes and layer.takes != layer.gives else 1.0
    return given * taken


@dataclass(frozen=True)
class Bound:
    """How much of a net may be left, in multiply-accumulates: its work, and what its time is counted in (`cost`)."""

    work: float
    cost: float


def bound(layers: Sequence[Layer], share: float) -> Bound:
    """What a share of a net's work, and of its time, is; something of the time stays whatever is removed."""
    return Bound(share * work(layers, {}), max(share - FIXED_SHARE, share / 2) * cost(layers, {}))


def block(channels: int) -> int:
    """What the number of channels that stay is a multiple of."""
    if channels < 2 * ROUND_TO:
        return 1
    return ROUND_WIDE_TO if channels >= WIDE else ROUND_TO


def kept(channels: int, ratio: float) -> int:
    """How many channels stay when a ratio is to go."""
    size = block(channels)
    least = min(LEAST_CHANNELS, channels) if size == 1 else size
    return min(channels, max(least, size * round(channels * (1 - ratio) / size)))


def evenly(layers: Sequence[Layer], groups: Mapping[str, int], share: float) -> dict[str, float]:
    """The same ratio everywhere but for rounding, such that a share of the work is left.

    Args:
        layers: of the net.
        groups: how many channels each has.
        share: of the work that is to be left.
    """
    whole = work(layers, {})
    low, high = 0.0, HIGHEST
    for _ in range(30):
        middle = (low + high) / 2
        if work(layers, _rounded(groups, middle)) > share * whole:
            low = middle
        else:
            high = middle
    return _rounded(groups, high)


def _rounded(groups: Mapping[str, int], ratio: float) -> dict[str, float]:
    return {name: 1 - kept(channels, ratio) / channels for name, channels in groups.items()}


def cheapest(
    layers: Sequence[Layer],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    wanted: Bound,
    channels: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Ratios that leave what may be left, at the least harm for the cost that is saved; a small step at a time.

    Args:
        layers: of the net.
        curves: by group, (ratio, harm) as measured, ratios rising from 0; between two of them harm is interpolated.
        wanted: what may be left.
        channels: how many each group has: steps are whole blocks of them; without, a sixteenth.

    Returns:
        A ratio for each group; the work that is left may be more than asked for where nothing more can be removed.
    """
    rising = {group: _rising(curve) for group, curve in curves.items()}
    ratios = dict.fromkeys(rising, 0.0)
    while work(layers, ratios) > wanted.work or cost(layers, ratios) > wanted.cost:
        best: tuple[float, str, float] | None = None
        for group, ratio in ratios.items():
            further = ratio + (block(channels[group]) / channels[group] if channels else STEP)
            if further > min(HIGHEST, rising[group][-1][0]) + 1e-9:
                continue
            if channels and 1 - kept(channels[group], further) / channels[group] < further - 1e-9:
                continue
            saved = cost(layers, ratios) - cost(layers, {**ratios, group: further})
            if saved <= 0:
                continue
            price = (harm(rising[group], further) - harm(rising[group], ratio)) / saved
            if best is None or price < best[0]:
                best = (price, group, further)
        if best is None:
            break
        ratios[best[1]] = best[2]
    return ratios


def harm(curve: Sequence[tuple[float, float]], ratio: float) -> float:
    """Interpolated harm of a ratio."""
    before = curve[0]
    for point in curve[1:]:
        if ratio <= point[0]:
            width = point[0] - before[0]
            return before[1] + (point[1] - before[1]) * (ratio - before[0]) / width
        before = point
    return curve[-1][1]


def _rising(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same curve, where more is never less harmful: what noise said otherwise is taken back."""
    found: list[tuple[float, float]] = []
    for ratio, value in curve:
        found.append((ratio, max(value, found[-1][1]) if found else value))
    return found
