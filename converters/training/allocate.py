"""How much of each group of channels to remove: pure arithmetic over measured sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STEP = 1 / 16
HIGHEST = 0.9


@dataclass(frozen=True)
class Layer:
    """One layer's work.

    Attributes:
        macs: multiply-accumulates of one row, before anything is removed.
        gives: the group whose channels it gives; None when those stay.
        takes: the group whose channels it takes; None when those stay, or when they are the ones it gives.
    """

    macs: float
    gives: str | None
    takes: str | None


def work(layers: Sequence[Layer], ratios: Mapping[str, float]) -> float:
    """Multiply-accumulates that are left when a ratio of each group's channels is removed."""
    left = 0.0
    for layer in layers:
        given = 1 - ratios.get(layer.gives, 0.0) if layer.gives else 1.0
        taken = 1 - ratios.get(layer.takes, 0.0) if layer.takes and layer.takes != layer.gives else 1.0
        left += layer.macs * given * taken
    return left


def evenly(layers: Sequence[Layer], groups: Sequence[str], share: float) -> dict[str, float]:
    """The same ratio everywhere, such that a share of the work is left."""
    whole = work(layers, {})
    low, high = 0.0, HIGHEST
    for _ in range(30):
        middle = (low + high) / 2
        if work(layers, dict.fromkeys(groups, middle)) > share * whole:
            low = middle
        else:
            high = middle
    return dict.fromkeys(groups, high)


def cheapest(
    layers: Sequence[Layer], curves: Mapping[str, Sequence[tuple[float, float]]], share: float
) -> dict[str, float]:
    """Ratios that leave a share of the work at the least harm, a small step at a time.

    Args:
        layers: of the net.
        curves: by group, (ratio, harm) as measured, ratios rising from 0; between two of them harm is interpolated.
        share: of the work that is to be left.

    Returns:
        A ratio for each group; the work that is left may be more than asked for where nothing more can be removed.
    """
    rising = {group: _rising(curve) for group, curve in curves.items()}
    ratios = dict.fromkeys(rising, 0.0)
    wanted = share * work(layers, {})
    now = work(layers, ratios)
    while now > wanted:
        best: tuple[float, str, float] | None = None
        for group, ratio in ratios.items():
            further = ratio + STEP
            if further > min(HIGHEST, rising[group][-1][0]):
                continue
            saved = now - work(layers, {**ratios, group: further})
            if saved <= 0:
                continue
            price = (harm(rising[group], further) - harm(rising[group], ratio)) / saved
            if best is None or price < best[0]:
                best = (price, group, further)
        if best is None:
            break
        ratios[best[1]] = best[2]
        now = work(layers, ratios)
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
