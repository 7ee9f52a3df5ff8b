"""Training rows: an `.npz` with an array for each input and targets as `y`; class indices, or numbers to be met."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.processing.rows import ARRAYS
from converters.dataset import read_arrays
from converters.errors import ConversionError

TARGETS = "y"
HELD_BACK_SHARE = 0.2
HELD_BACK_ROWS = 4000
LEAST_ROWS = 20


@dataclass(frozen=True)
class Rows:
    """Rows to train on or to score with.

    Attributes:
        inputs: by name, in the order of the net's parameters; the first axis counts rows.
        targets: (rows,) int64 class indices, or floating-point numbers of the output's shape.
    """

    inputs: dict[str, npt.NDArray[Any]]
    targets: npt.NDArray[Any]

    @property
    def count(self) -> int:
        """How many."""
        return len(self.targets)

    @property
    def classifies(self) -> bool:
        """Whether the targets are class indices."""
        return self.targets.dtype.kind in "iu"

    def take(self, index: npt.NDArray[np.int64]) -> Rows:
        """Some of them."""
        return Rows({name: array[index] for name, array in self.inputs.items()}, self.targets[index])

    def first(self, count: int) -> Rows:
        """The first of them."""
        return self.take(np.arange(min(count, self.count)))

    def batches(self, size: int, rng: np.random.Generator | None = None) -> Iterator[Rows]:
        """All of them, `size` at a time, shuffled where a generator is given."""
        order = np.arange(self.count) if rng is None else rng.permutation(self.count)
        for start in range(0, self.count, size):
            yield self.take(order[start : start + size])


def read_validation(path: Path | None, like: Rows) -> Rows | None:
    """Rows to decide by; None where there is no file, or its rows have no targets as the training rows have.

    Images are no rows to train with, so that none are to decide by either.

    Raises:
        ConversionError: `bad_data`.
    """
    arrays = {} if path is None else read_arrays(path, "validation")
    if TARGETS not in arrays or not ARRAYS.isdisjoint(arrays):
        return None
    found = _rows(arrays, "validation")
    fits = found.classifies == like.classifies and set(found.inputs) == set(like.inputs)
    return Rows({name: found.inputs[name] for name in like.inputs}, found.targets) if fits else None


def read_training(path: Path) -> Rows:
    """Read training rows.

    Raises:
        ConversionError: `bad_data`, saying what is wrong with which array.
    """
    return _rows(read_arrays(path, "training"), "training")


def _rows(found: dict[str, npt.NDArray[Any]], field: str) -> Rows:
    """Arrays as rows with targets; the targets are taken out of them."""
    if TARGETS not in found:
        detail = f"{field}: it has arrays {sorted(found)}, but no targets `y`: class indices, or numbers to be met"
        raise ConversionError("bad_data", detail, field)
    targets = found.pop(TARGETS)
    lengths = {name: len(array) for name, array in found.items()}
    if not found or set(lengths.values()) != {len(targets)} or len(targets) < LEAST_ROWS:
        detail = (
            f"{field}: every array needs as many rows as `y` has ({len(targets)}), at least {LEAST_ROWS}: {lengths}"
        )
        raise ConversionError("bad_data", detail, field)
    for name, array in {**found, TARGETS: targets}.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConversionError("bad_data", f"{field}: {name!r} holds NaN or infinity: remove those rows", field)
    if targets.dtype.kind in "iu":
        if targets.ndim != 1 or targets.min() < 0:
            detail = f"{field}: class indices `y` must be one a row and not negative, not of shape {targets.shape}"
            raise ConversionError("bad_data", detail, field)
        return Rows(found, targets.astype(np.int64))
    if targets.dtype.kind != "f":
        raise ConversionError("bad_data", f"{field}: `y` holds {targets.dtype}: integers or floats are meant", field)
    return Rows(found, targets.astype(np.float32))


def deciding(rows: Rows, validation: Rows | None, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on, and rows to decide by how far a pass may go.

    Validation rows decide where there are any, and all others are trained on. Else a part of the training rows is held
    back. A net that was trained on those knows them by heart, which flatters it beside what is fine-tuned without them:
    pruning then stops too early, never too late.
    """
    if validation is None:
        return hold_back(rows, seed)
    order = np.random.default_rng(seed).permutation(validation.count)
    return rows, validation.take(order[:HELD_BACK_ROWS])


def hold_back(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    """Training rows in two parts."""
    order = np.random.default_rng(seed).permutation(rows.count)
    back = min(HELD_BACK_ROWS, max(LEAST_ROWS // 4, int(rows.count * HELD_BACK_SHARE)))
    return rows.take(order[back:]), rows.take(order[:back])
