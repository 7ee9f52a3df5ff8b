"""Rows to try a net on: real ones where there are any, else guesses that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from agent.protocol.manifest import RuntimeName, TensorSpec
from agent.runtimes.base import STRING, numpy_dtype
from agent.trial.dataset import Dataset
from converters.errors import ConversionError
from converters.evaluate import rows_mix, takes
from converters.job import SourceFile, Target
from converters.package import Specs, manifest_for, with_examples

SAMPLE_ROWS = 16
GUESSED_TEXT = "a text"
GUESSED_SIZES = (64, 256, 640, 16, 1)
ANY = Target("inspection", RuntimeName.ONNX, ("cpu",), ())  # where nothing is built for a device yet


def sample_rows(data: dict[str, Dataset], main: SourceFile, specs: Specs) -> Dataset:
    """Real rows where there are any; seeded random ones otherwise, of sizes that the file takes.

    Raises:
        ConversionError: when no guess at the sizes of its free dimensions runs.
    """
    real = data.get("evaluation") or data.get("calibration")
    if real is not None:
        return real.part(0, SAMPLE_ROWS)
    path, said = Path(main.path), ""
    for guess in guesses(specs):
        refused = takes(manifest_for(path, with_examples(specs, guess), main.format, ANY), path)
        if refused is None:
            return guess
        said = said or refused
    free = ", ".join(f"{spec.name!r} {['any' if size < 0 else size for size in spec.shape]}" for spec in specs[0])
    detail = f"sources: it runs on no made-up row ({said}) of {free}: give --calibration or --evaluation with real rows"
    raise ConversionError("bad_model", detail.replace("'any'", "any"), "sources")


def guesses(specs: Specs) -> Iterator[Dataset]:
    """Random rows for a net of which no real ones are there, with one size after another for its free dimensions.

    Integers and truths are one, then zero: one is a token that most vocabularies have, and a mask that hides nothing.
    Texts are some words, then empty.
    """
    inputs = specs[0]
    batched = all(spec.shape and spec.shape[0] in {-1, 1} for spec in inputs)
    free = any(size < 0 for spec in inputs for size in spec.shape[1 if batched else 0 :])
    firsts = (0,) if batched else (1, 0)  # 0: as large as any other free dimension
    for value in (1, 0):
        for size in GUESSED_SIZES if free else (1,):
            for first in firsts:
                yield _guess(inputs, batched=batched, first=first or size, size=size, value=value)


def _guess(inputs: tuple[TensorSpec, ...], *, batched: bool, first: int, size: int, value: int) -> Dataset:
    rng = np.random.default_rng(0)
    rows = 1 if any(spec.shape[:1] != (-1,) for spec in inputs) else SAMPLE_ROWS
    arrays = {}
    for spec in inputs:
        sizes = [(first if axis == 0 else size) if given < 0 else given for axis, given in enumerate(spec.shape)]
        shape = (rows, *sizes[1:]) if batched else (rows, *sizes)
        dtype = numpy_dtype(spec.dtype)
        if spec.dtype == STRING:
            arrays[spec.name] = np.full(shape, GUESSED_TEXT if value else "", dtype)
            continue
        arrays[spec.name] = rng.random(shape).astype(dtype) if dtype.kind == "f" else np.full(shape, value, dtype)
    return Dataset(arrays, None, rows, frozenset() if batched else frozenset(arrays))


def without_mixing(target: Target, main: SourceFile, specs: Specs, data: Dataset) -> Target:
    """The target, with batches of one where the net mixes the rows of a batch."""
    path = Path(main.path)
    mixes = rows_mix(manifest_for(path, specs, main.format, target), path, data)
    return msgspec.structs.replace(target, max_batch=1) if mixes else target
