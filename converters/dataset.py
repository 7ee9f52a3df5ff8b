"""Data sets: `.npz` files with an array for each input and labels as `y`. Bounded, and never unpickled.

How arrays are read as rows is said in `agent.trial.dataset`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.processing.decode import NoDecoderError
from agent.processing.image import ImageError
from agent.processing.rows import ARRAYS
from agent.protocol.manifest import TensorSpec
from agent.protocol.processing import Processing
from agent.runtimes.base import STRING
from agent.trial.dataset import LABELS, Array, Dataset, array_name, as_dtype, labels_of, with_images
from converters.errors import ConversionError

BYTES_LIMIT = 4 << 30


def load_dataset(
    path: Path,
    specs: tuple[TensorSpec, ...],
    field: str,
    processing: Processing | None = None,
    missing_taken: Callable[[str, Dataset], bool] | None = None,
) -> Dataset:
    """Read a data set for a model's inputs.

    Args:
        path: of the `.npz`.
        specs: the model's inputs.
        field: `calibration` or `evaluation`, for errors.
        processing: how its images become inputs; None where only inputs are taken.
        missing_taken: whether the model takes NaN in an input, of which it gets the name and the rows that hold some;
            None where no model does.

    Raises:
        ConversionError: saying which array is missing or does not fit, what it is and what it ought to be.
    """
    arrays = read_arrays(path, field, BYTES_LIMIT)
    try:
        arrays = with_images(arrays, specs, processing, BYTES_LIMIT)
    except (ImageError, NoDecoderError) as error:
        raise ConversionError("bad_data", f"{field}: {error}", field) from None
    inputs = {}
    whole = set()
    for spec in specs:
        key = array_name(spec, list(arrays), inputs=len(specs))
        if key not in arrays:
            detail = f"{field}: it has arrays {sorted(arrays)}, but none for the input {spec.name!r}"
            if not ARRAYS.isdisjoint(arrays) and processing is None:
                detail += ": images need a declaration of how they become inputs (--processing)"
            raise ConversionError("bad_data", detail, field)
        inputs[spec.name] = _fit(arrays[key], spec, field)
        if inputs[spec.name].ndim > len(spec.shape):
            whole.add(spec.name)
    lengths = {name: len(array) for name, array in inputs.items()}
    rows = next(iter(lengths.values()))
    if len(set(lengths.values())) != 1 or rows == 0:
        raise ConversionError("bad_data", f"{field}: every array needs the same number of rows, not {lengths}", field)
    found = Dataset(inputs, _labels(labels_of(arrays, specs), rows, field), rows, frozenset(whole))
    for name, array in inputs.items():
        missing = rows_missing({name: array})
        if missing.any() and not (missing_taken and missing_taken(name, only(found, np.flatnonzero(missing)))):
            detail = (
                f"{field}: {name!r} holds NaN, which the model does not take for a missing value: remove those rows"
            )
            raise ConversionError("bad_data", detail, field)
    return found


def rows_missing(inputs: Mapping[str, Array]) -> npt.NDArray[np.bool_]:
    """Which rows hold NaN in some input."""
    found = np.zeros(len(next(iter(inputs.values()))), np.bool_)
    for array in inputs.values():
        if array.dtype.kind == "f":
            found |= np.isnan(array).reshape(len(array), -1).any(1)
    return found


def only(data: Dataset, rows: npt.NDArray[np.intp]) -> Dataset:
    """Some rows of a data set, without labels."""
    return Dataset({name: array[rows] for name, array in data.inputs.items()}, None, len(rows), data.whole)


def example_rows(path: Path, field: str, processing: Processing | None = None, count: int = 2) -> dict[str, Array]:
    """The first rows of a data set by input, in the order in which they were written: that of the net's parameters.

    Images make the input that the declaration names, or else one called `image`, in float32.

    Raises:
        ConversionError: `bad_data`.
    """
    arrays = {name: array for name, array in read_arrays(path, field, BYTES_LIMIT).items() if name != LABELS}
    if not ARRAYS.isdisjoint(arrays) and processing is not None:
        name = processing.image.input or "image"
        data = load_dataset(path, (TensorSpec(name, "float32", (-1, -1, -1, -1)),), field, processing)
        return {name: data.inputs[name][:count]}
    single = [name for name, array in arrays.items() if array.ndim == 0]
    if single:
        raise ConversionError("bad_data", f"{field}: {single[0]!r} is a single number, and not one a row", field)
    return {name: array[:count] for name, array in arrays.items()}


def read_arrays(path: Path, field: str, limit: int | None = None) -> dict[str, Array]:
    """Every array of an `.npz`, by name.

    Args:
        path: of the file.
        field: of the request, for errors.
        limit: of bytes, unpacked; None is no bound.

    Raises:
        ConversionError: `bad_data`, when it is too large, or no `.npz` of plain arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if limit is not None and size > limit:
            raise ConversionError("bad_data", f"{field}: unpacked it has {size} bytes, at most {limit}", field)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError) as error:
        detail = f"{field}: not a readable .npz of plain arrays ({str(error)[:200]}); write it with numpy.savez"
        raise ConversionError("bad_data", detail, field) from None


def _fit(array: Array, spec: TensorSpec, field: str) -> Array:
    by_rows, whole = spec.shape[1:], spec.shape
    counts_rows = spec.shape[:1] in {(-1,), (1,)}
    if not (counts_rows and _agrees(array.shape[1:], by_rows)) and not _agrees(array.shape[1:], whole):
        sizes = ["any" if size < 0 else str(size) for size in (by_rows if counts_rows else whole)]
        detail = (
            f"{field}: {spec.name!r} has shape {list(array.shape)}, but the model takes [{', '.join(['rows', *sizes])}]"
        )
        raise ConversionError("bad_data", detail, field)
    if spec.dtype == STRING:
        try:
            return as_dtype(array, STRING)
        except ValueError as error:
            detail = f"{field}: {spec.name!r}: {error}; make it an array of str (numpy's U), not of objects"
            raise ConversionError("bad_data", detail, field) from None
    dtype = np.dtype(spec.dtype)
    if array.dtype != dtype:
        if not np.can_cast(array.dtype, dtype, casting="same_kind"):
            detail = f"{field}: {spec.name!r} holds {array.dtype}, but the model takes {dtype}: convert it first"
            raise ConversionError("bad_data", detail, field)
        array = _held(array, dtype, spec.name, field)
    if array.dtype.kind == "f" and np.isinf(array).any():
        raise ConversionError("bad_data", f"{field}: {spec.name!r} holds infinity: remove those rows", field)
    return array


def _held(array: Array, dtype: np.dtype[Any], name: str, field: str) -> Array:
    """An array in a narrower dtype of its kind; what that can't hold would become another number without a word.

    Raises:
        ConversionError: `bad_data`, with such a number.
    """
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(narrow) if dtype.kind == "f" else narrow != array
    if lost.any():
        detail = f"{field}: {name!r} holds {array[lost][0]:g}, which {dtype} can't: scale it as the model's input is"
        raise ConversionError("bad_data", detail, field)
    return narrow


def _agrees(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(size in {-1, got} for size, got in zip(wanted, shape, strict=True))


def _labels(array: Array | None, rows: int, field: str) -> npt.NDArray[np.int64] | None:
    if array is None:
        return None
    if array.shape != (rows,) or array.dtype.kind not in "iu" or (array.size and array.min() < 0):
        detail = (
            f"{field}: labels `y` must be {rows} class indices, not {array.dtype} of shape {list(array.shape)}: give "
            "one a row, counted from 0 in the order of the scores, or leave `y` out, and closeness to the source is "
            "measured"
        )
        raise ConversionError("bad_data", detail, field)
    return array.astype(np.int64)
