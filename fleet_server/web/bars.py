"""Histograms of the API as places in a picture: of each bin two bars, the reference and what there is now. Pure."""

from __future__ import annotations

from typing import Any

from fleet_server.web.api import Json

WIDTH, HEIGHT = 480.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 474.0, 8.0, 168.0
LABELS = 6  # below the picture, at most
LABEL_CHARS = 10
GAP = 0.16  # of a bin's width, at either side


def bars(distribution: Json) -> dict[str, Any]:
    """Places of the bars of a distribution, of its axes and labels.

    Args:
        distribution: of the API.
    """
    bins = distribution["bins"]
    highest = max((one[side] or 0.0 for one in bins for side in ("reference", "now")), default=0.0) or 1.0
    step = (RIGHT - LEFT) / max(len(bins), 1)
    thick = step * (1 - 2 * GAP) / 2

    def bar(at: int, side: str, share: float | None) -> dict[str, float]:
        height = (BOTTOM - TOP) * (share or 0.0) / highest
        x = LEFT + step * (at + GAP) + (thick if side == "now" else 0.0)
        return {"x": x, "y": BOTTOM - height, "width": thick, "height": height}

    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": RIGHT,
        "bottom": BOTTOM,
        "reference": [bar(at, "reference", one["reference"]) for at, one in enumerate(bins)],
        "now": [bar(at, "now", one["now"]) for at, one in enumerate(bins)],
        "up": [(BOTTOM - (BOTTOM - TOP) * part / 2, highest * part / 2) for part in range(3)],
        "labels": _labels(bins, step),
    }


def _labels(bins: list[Json], step: float) -> list[dict[str, Any]]:
    """Edges of bins of numbers, where they are; else names, in the middle of their bins."""
    places: list[tuple[float, str]] = []
    for at, one in enumerate(bins):
        if one["low"] is not None:
            places.append((LEFT + step * at, f"{one['low']:.3g}"))
        elif one["high"] is None:
            places.append((LEFT + step * (at + 0.5), _short(one["label"])))
    every = -(-len(places) // LABELS) or 1
    return [{"x": x, "text": text} for x, text in places[::every]]


def _short(text: str) -> str:
    return text if len(text) <= LABEL_CHARS else text[: LABEL_CHARS - 1] + "…"
