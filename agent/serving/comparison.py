"""Whether two versions of a model answered alike, a row at a time: pure.

Of a classifier the answer is the class with the largest score: scores themselves differ between any two versions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from agent.runtimes.base import Array, Tensors
from agent.telemetry.sketches import holds_scores

RELATIVE = 1e-2  # of the largest number of the row: how far numbers may be apart where nobody measured what is usual
LEAST = 1e-6


def disagreements(served: Tensors, other: Tensors, rows: int, allowed: Mapping[str, float]) -> int:
    """How many rows two versions answered otherwise.

    The first output that holds scores of classes is compared by its largest one, other outputs of floating-point
    numbers by their largest difference, and all others by whether they are the same. Outputs of other names or shapes
    make every row another one, and so does a difference in an output that has no row for each row.

    Args:
        served: answers of the version that serves, by output.
        other: answers of the other one.
        rows: how many were asked for.
        allowed: by output, the largest difference that counts as none; where there is none, a hundredth of the largest
            number of the row.
    """
    differs = np.zeros(rows, bool)
    scores_seen = False
    with np.errstate(all="ignore"):
        for name, mine in served.items():
            theirs = other.get(name)
            if theirs is None or theirs.shape != mine.shape:
                return rows
            by_row = mine.shape[:1] == (rows,)
            if by_row and holds_scores(mine) and not scores_seen:
                scores_seen = True
                differs |= mine.argmax(axis=1) != theirs.argmax(axis=1)
                continue
            shape = (rows if by_row else 1, -1)
            if mine.size:
                differs |= _apart(mine.reshape(shape), theirs.reshape(shape), allowed.get(name))
    return int(differs.sum())


def _apart(mine: Array, theirs: Array, allowed: float | None) -> Array:
    """Which rows are too far from each other; of numbers that are none, only the same is near."""
    if mine.dtype.kind != "f" or theirs.dtype.kind != "f":
        others: Array = (mine != theirs).any(axis=1)
        return others
    one, two = mine.astype(np.float64), theirs.astype(np.float64)
    same = (one == two) | (np.isnan(one) & np.isnan(two))
    distance = np.where(same, 0.0, np.abs(one - two))
    distance[np.isnan(distance)] = np.inf
    if allowed is not None:
        far: Array = distance.max(axis=1) > allowed
        return far
    size = np.where(np.isfinite(one), np.abs(one), 0.0).max(axis=1)
    far_off: Array = distance.max(axis=1) > RELATIVE * size + LEAST
    return far_off
