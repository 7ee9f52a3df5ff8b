"""Outputs as classes: the largest numbers of a row, as Triton's classification extension writes them. Pure."""

from __future__ import annotations

import numpy as np

from agent.runtimes.base import Array

CLASSES_LIMIT = 4096  # of a row


def top_classes(array: Array, count: int, labels: tuple[str, ...]) -> Array:
    """The largest numbers of each row, the largest first; of equal ones the first comes first.

    Args:
        array: (rows, …) of numbers, or (classes,) for a single row.
        count: how many are wanted; fewer are given where a row has fewer.
        labels: class names by index.

    Returns:
        Strings `value:index` or `value:index:label`, shape (rows, count); (count,) for a single row.
    """
    rows = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)
    count = min(count, rows.shape[1])
    found = np.empty((len(rows), count), object)
    for number, row in enumerate(rows):
        for place, index in enumerate(_largest(row)[:count]):
            value = row[index]
            text = f"{float(value):f}" if array.dtype.kind == "f" else str(int(value))
            label = f":{labels[index]}" if index < len(labels) else ""
            found[number, place] = f"{text}:{index}{label}"
    return found if array.ndim > 1 else found[0]


def _largest(row: Array) -> Array:
    """Indices, that of the largest number first; what is no number comes last."""
    if row.dtype.kind == "f":
        return np.argsort(-row, kind="stable")
    backwards = np.argsort(row[::-1], kind="stable")[::-1]
    order: Array = len(row) - 1 - backwards
    return order
