"""Rows of a data set, as they are fed to a model. The server has checked the file; what does not fit is an error here.

An array's first axis counts rows. Where it has as many axes as the model's input, that is the input's first axis too.
Where it has one more, each row is a whole input: for recurrent states, whose rows lie on another axis, and for scalars.

Texts are an array of `str` (numpy's `U`), or of `bytes` in UTF-8 (`S`): both are read without pickle. numpy drops NUL
characters at their ends.

Labels are the array `y`. Where an input of the model is called `y`, that array holds its rows and there are no labels,
but for a model of which it is the only input: its rows may be `x`, and `y` is free for labels then.

Where a version declares how images become its input, a data set may hold images in that array's place
(`agent.processing.rows`): the rows are then made of them here, as they would be of images that are posted.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.processing.decode import NoDecoderError
from agent.processing.image import ImageError
from agent.processing.rows import rows_of
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import TensorSpec
from agent.protocol.processing import Processing
from agent.protocol.processing_rules import image_input
from agent.runtimes.base import STRING

Array = npt.NDArray[Any]
LABELS = "y"
ONLY_INPUT = "x"
UNPACKED_BYTES = LIMITS.artifact_bytes


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


def as_dtype(array: Array, dtype: str) -> Array:
    """An array of a data set as a model takes it.

    Raises:
        ValueError: when texts are wanted and it holds none, or bytes that are not UTF-8.
    """
    if dtype != STRING:
        return array.astype(dtype, copy=False)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    if array.dtype.kind != "U":
        raise ValueError(f"it holds {array.dtype} where texts are taken")
    return array.astype(object)


def array_name(spec: TensorSpec, names: list[str], *, inputs: int) -> str:
    """The array that holds an input: of its name, or `x` where the model has but one input."""
    if inputs == 1 and spec.name == LABELS and ONLY_INPUT in names:
        return ONLY_INPUT
    return spec.name if spec.name in names or inputs != 1 else ONLY_INPUT


def labels_of(arrays: dict[str, Array], specs: tuple[TensorSpec, ...]) -> Array | None:
    """The array of labels; None where there is none, or where it holds an input."""
    held = {array_name(spec, list(arrays), inputs=len(specs)) for spec in specs}
    return None if LABELS in held else arrays.get(LABELS)


def with_images(
    arrays: dict[str, Array], specs: tuple[TensorSpec, ...], processing: Processing | None, limit: int
) -> dict[str, Array]:
    """Arrays of a data set, with that of the input that its images make where they hold images and not the input.

    Args:
        arrays: by name.
        specs: the model's inputs.
        processing: the version's declaration; None leaves the arrays as they are.
        limit: of bytes of the input.

    Raises:
        ImageError: when an image can't be taken, or all of them are too much.
        NoDecoderError: when images are encoded and Pillow is not installed.
    """
    if processing is None:
        return arrays
    spec = image_input(processing.image, specs)
    key = array_name(spec, list(arrays), inputs=len(specs))
    rows = None if key in arrays else rows_of(arrays, processing.image, spec.dtype, limit)
    return arrays if rows is None else {**arrays, key: rows}


class DataSetError(Exception):
    """A data set can't be read, or is not one of the model's; the message says why."""


def read_checked(path: Path, specs: tuple[TensorSpec, ...], processing: Processing | None = None) -> Dataset:
    """Read an `.npz` that the server has checked against the model's inputs.

    Raises:
        DataSetError: when it can't be read, unpacks to more than `UNPACKED_BYTES`, or does not fit the inputs.
    """
    import zipfile  # the inference worker, which imports this, opens no data sets

    try:
        with zipfile.ZipFile(path) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > UNPACKED_BYTES:
                raise DataSetError(f"it unpacks to more than {UNPACKED_BYTES} bytes")
        return _read(path, specs, processing)
    except (ImageError, NoDecoderError) as error:
        raise DataSetError(str(error)) from None
    except (OSError, EOFError, KeyError, ValueError, ArithmeticError) as error:
        raise DataSetError(str(error)[:300] or type(error).__name__) from None
    except (MemoryError, NotImplementedError, RuntimeError, SyntaxError, TypeError) as error:
        # Headers of arrays are Python literals, and a zip file may ask for passwords and other methods.
        raise DataSetError(f"{type(error).__name__}: {str(error)[:300]}") from None
    except (zipfile.BadZipFile, zlib.error, UnicodeError) as error:
        raise DataSetError(f"it is damaged: {str(error)[:300]}") from None


def _read(path: Path, specs: tuple[TensorSpec, ...], processing: Processing | None) -> Dataset:
    with np.load(path, allow_pickle=False) as packed:
        arrays = {name: packed[name] for name in packed.files}
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError("it holds files that are no arrays")
    arrays = with_images(arrays, specs, processing, UNPACKED_BYTES)
    inputs = {
        spec.name: as_dtype(arrays[array_name(spec, list(arrays), inputs=len(specs))], spec.dtype) for spec in specs
    }
    found = labels_of(arrays, specs)
    labels = found.astype(np.int64) if found is not None else None
    if not all(array.ndim for array in inputs.values()):
        raise ValueError("an array of it has no axis that counts rows")
    whole = frozenset(spec.name for spec in specs if inputs[spec.name].ndim > len(spec.shape))
    return Dataset(inputs, labels, len(next(iter(inputs.values()))), whole)
