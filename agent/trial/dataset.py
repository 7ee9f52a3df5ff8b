"""Rows of a data set, as they are fed to a model. The server has checked the file; what does not fit is an error here.

An array's first axis counts rows. Where it has as many axes as the model's input, that is the input's first axis too.
Where it has one more, each row is a whole input: for recurrent states, whose rows lie on another axis, and for scalars.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.protocol.manifest import TensorSpec

Array = npt.NDArray[Any]
LABELS = "y"
ONLY_INPUT = "x"


@dataclass(frozen=True)
class Dataset:
    """Rows of inputs, and perhaps labels.

    Attributes:
        inputs: by source name; the first axis counts rows.
        labels: (rows,) int64 class indices; None when there are none.
        rows: how many.
        whole: inputs of which a row is all that the model takes.
    """

    inputs: dict[str, Array]
    labels: npt.NDArray[np.int64] | None
    rows: int
    whole: frozenset[str] = frozenset()

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Rows in order, `size` at a time (one, where a row is a whole input); the last may be shorter."""
        step = 1 if self.whole else size
        for start in range(0, self.rows, step):
            yield {
                name: np.asarray(array[start] if name in self.whole else array[start : start + step], order="C")
                for name, array in self.inputs.items()
            }

    def part(self, start: int, stop: int) -> Dataset:
        """Rows from `start` up to `stop`, without labels."""
        stop = min(stop, self.rows)
        inputs = {name: array[start:stop] for name, array in self.inputs.items()}
        return Dataset(inputs, None, stop - start, self.whole)

    def row_shape(self, name: str) -> tuple[int, ...]:
        """The shape in which the model gets one row of an input."""
        rest: tuple[int, ...] = self.inputs[name].shape[1:]
        return rest if name in self.whole else (1, *rest)


def array_name(spec: TensorSpec, names: list[str], *, inputs: int) -> str:
    """The array that holds an input: of its name, or `x` where the model has but one input."""
    return spec.name if spec.name in names or inputs != 1 else ONLY_INPUT


def read_checked(path: Path, specs: tuple[TensorSpec, ...]) -> Dataset:
    """Read an `.npz` that the server has checked against the model's inputs.

    Raises:
        KeyError: when an array is missing.
        ValueError: when the file is no `.npz` of plain arrays.
        OSError: when it can't be read.
    """
    with np.load(path, allow_pickle=False) as arrays:
        inputs = {
            spec.name: arrays[array_name(spec, arrays.files, inputs=len(specs))].astype(spec.dtype, copy=False)
            for spec in specs
        }
        labels = arrays[LABELS].astype(np.int64) if LABELS in arrays.files else None
    whole = frozenset(spec.name for spec in specs if inputs[spec.name].ndim > len(spec.shape))
    return Dataset(inputs, labels, len(next(iter(inputs.values()))), whole)
