"""Golden inputs: a few rows, and what an artifact answered to them when it was built.

A device that gets other answers does not let the artifact serve. Converters write the file, the inference worker reads
it; this knows neither.

How far answers may be from those of the build is not guessed: a variant's own distance from its source, on the same
rows, is what its arithmetic costs, and another processor's rounding costs no more than a few times that
(docs/decisions/010-golden-inputs.md). What goes beyond is another net, or arithmetic that overflows.

Texts are written as arrays of `str` (numpy's `U`), which need no pickle; NUL characters at their ends do not count.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest
from agent.runtimes.base import Array, Runtime, Tensors, reason
from agent.trial.dataset import Dataset

ROWS = 8
BYTES = 256 * 1024  # of inputs, before they are packed; one row may have more
KEPT = 4096  # numbers of one output of one row: as many as say how far it is off
UNPACKED_BYTES = 64 << 20
FACTOR = 3.0
LEAST = 0.02  # of the spread of an output: what other kernels and 19-bit floats of accelerators cost
MOST = 0.5
LEAST_OTHERS = 0.25  # share of an output of integers that may be others: the largest of two near scores turns
UNCOMPARED = -1.0


class GoldenError(Exception):
    """A file of golden inputs can't be read, or is none of this model's; the message says why."""


@dataclass(frozen=True)
class Answer:
    """One output of one row: its shape, and its numbers in order, or as many of them at even distances as are kept."""

    shape: tuple[int, ...]
    values: Array

    @property
    def whole(self) -> bool:
        """Whether every number was kept."""
        return len(self.values) == int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Golden:
    """Golden inputs of one artifact.

    Attributes:
        rows: inputs by name, of one row each.
        answers: of each row, by output.
        tolerances: by output, see `compare`; `UNCOMPARED` where only its number of axes has to be right.
    """

    rows: tuple[Tensors, ...]
    answers: tuple[dict[str, Answer], ...]
    tolerances: dict[str, float]


def pick_rows(data: Dataset) -> tuple[Tensors, ...]:
    """Up to eight rows, evenly spread over a data set; fewer where they are large, none where one alone is too much."""
    picked: list[Tensors] = []
    total = 0
    for index in np.unique(np.linspace(0, data.rows - 1, ROWS).astype(int)):
        row = next(data.part(int(index), int(index) + 1).batches(1))
        size = sum(_plain(array).nbytes for array in row.values())
        if size > LIMITS.golden_bytes // 2 or (picked and total + size > BYTES):
            break
        picked.append(row)
        total += size
    return tuple(picked)


def answer_rows(runtime: Runtime, rows: Sequence[Tensors]) -> tuple[dict[str, Answer], ...]:
    """What a runtime answers to each row alone."""
    return tuple({name: _kept(np.asarray(value)) for name, value in runtime.run(row).items()} for row in rows)


def _kept(value: Array) -> Answer:
    flat = value.reshape(-1)
    step = max(1, -(-flat.size // KEPT))
    return Answer(value.shape, np.array(flat[::step]))


def made(
    rows: tuple[Tensors, ...], mine: tuple[dict[str, Answer], ...], source: tuple[dict[str, Answer], ...]
) -> Golden:
    """Golden inputs of an artifact: its answers, and tolerances by how far those of its source are from them."""
    names = list(mine[0]) if mine else []
    return Golden(
        rows, mine, {name: _tolerance([m[name] for m in mine], [s.get(name) for s in source]) for name in names}
    )


def _tolerance(mine: list[Answer], source: list[Answer | None]) -> float:
    pairs = [(one, other) for one, other in zip(mine, source, strict=True) if other is not None]
    if len(pairs) < len(mine) or any(one.shape != other.shape for one, other in pairs):
        return UNCOMPARED  # its size hangs on its answer, as of boxes that were found
    spread = _spread(mine)
    worst = max(_distance(one.values, other.values, spread) for one, other in pairs)
    least = LEAST if mine[0].values.dtype.kind == "f" else LEAST_OTHERS
    return float(np.clip(FACTOR * worst, least, MOST))


def write(golden: Golden, path: Path) -> None:
    """Write an `.npz`; the same golden inputs give the same bytes."""
    arrays: dict[str, Array] = {"tolerances": np.array(list(golden.tolerances.values()), np.float64)}
    for number, (row, answers) in enumerate(zip(golden.rows, golden.answers, strict=True)):
        for name, value in row.items():
            arrays[f"{number}/in/{name}"] = _plain(value)
        for name, answer in answers.items():
            arrays[f"{number}/out/{name}"] = _plain(answer.values)
            arrays[f"{number}/shape/{name}"] = np.array(answer.shape, np.int64)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its stub takes a flag for an array


def _plain(array: Array) -> Array:
    """An array that a file may hold: texts as `str` of one length."""
    return array.astype(np.str_) if array.dtype.kind == "O" else array


def _texts(array: Array) -> Array:
    """Of `_plain`, what it was made of."""
    return array.astype(object) if array.dtype.kind == "U" else array


def read(path: Path, manifest: Manifest) -> Golden:
    """Read golden inputs of an artifact.

    Raises:
        GoldenError: when they are damaged, too large, or not of this artifact.
    """
    import zipfile  # not at each start of the inference worker

    try:
        with zipfile.ZipFile(path) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > UNPACKED_BYTES:
                raise GoldenError(f"it unpacks to more than {UNPACKED_BYTES} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            return _read(dict(arrays), manifest)
    except (OSError, EOFError, KeyError, ValueError, ArithmeticError, MemoryError, zipfile.BadZipFile) as error:
        raise GoldenError(str(error)[:300] or type(error).__name__) from None
    except (NotImplementedError, RuntimeError, SyntaxError, TypeError, zlib.error, UnicodeError) as error:
        # Headers of arrays are Python literals, and a zip file may ask for passwords and other methods.
        raise GoldenError(f"{type(error).__name__}: {str(error)[:300]}") from None


def _read(arrays: dict[str, Array], manifest: Manifest) -> Golden:
    outputs = [spec.name for spec in manifest.outputs]
    count = sum(f"{number}/in/{manifest.inputs[0].name}" in arrays for number in range(ROWS))
    arrays = {name: _texts(array) for name, array in arrays.items()}
    rows = tuple({spec.name: arrays[f"{number}/in/{spec.name}"] for spec in manifest.inputs} for number in range(count))
    answers = tuple(
        {
            name: Answer(
                tuple(int(size) for size in arrays[f"{number}/shape/{name}"]),
                arrays[f"{number}/out/{name}"].reshape(-1),
            )
            for name in outputs
        }
        for number in range(count)
    )
    tolerances = [float(one) for one in arrays["tolerances"]]
    if not count or len(tolerances) != len(outputs):
        raise GoldenError("it holds no row, or not as many tolerances as the model has outputs")
    return Golden(rows, answers, dict(zip(outputs, tolerances, strict=True)))


def check(golden: Golden, runtime: Runtime) -> str | None:
    """None when a runtime answers as the artifact did where it was built; else where it does not, and how far off."""
    for number, row in enumerate(golden.rows):
        try:
            (got,) = answer_rows(runtime, [row])
        except Exception as error:  # noqa: BLE001 (a runtime raises anything)
            return f"row {number} of the golden inputs is not answered: {reason(error)}"
        for name in golden.tolerances:
            problem = compare(golden, number, name, got[name])
            if problem:
                return f"output {name!r}, row {number} of the golden inputs: {problem}"
    return None


def differences(golden: Golden) -> dict[str, float]:
    """By output of floating-point numbers how far two answers may be apart that count as the same."""
    found = {}
    for name, tolerance in golden.tolerances.items():
        answers = [row[name] for row in golden.answers]
        if tolerance != UNCOMPARED and answers[0].values.dtype.kind == "f":
            found[name] = tolerance * _spread(answers)
    return found


def compare(golden: Golden, number: int, name: str, got: Answer) -> str | None:
    """Why an answer to a golden row is not the one that is wanted; None when it is.

    The distance of numbers is the root of their mean squared difference, in units of the output's spread over all
    golden rows; of integers, truths and texts it is the share that differs. Where an output holds scores of classes,
    the largest has to be the same one too, unless the two are nearer to each other than the tolerance.
    """
    want, tolerance = golden.answers[number][name], golden.tolerances[name]
    if tolerance == UNCOMPARED:
        same = len(got.shape) == len(want.shape)
        return None if same else f"it has {len(got.shape)} axes, and {len(want.shape)} where the artifact was built"
    if got.shape != want.shape or got.values.shape != want.values.shape:
        return f"it has the shape {list(got.shape)}, and {list(want.shape)} where the artifact was built"
    spread = _spread([answers[name] for answers in golden.answers])
    distance = _distance(got.values, want.values, spread)
    if not distance <= tolerance:
        return f"the answer is {distance:.3g} away from the build's, in units of its spread; {tolerance:.3g} is allowed"
    if (
        want.whole
        and len(want.shape) == 2
        and want.shape[0] == 1
        and want.shape[1] > 1
        and want.values.dtype.kind == "f"
    ):
        top, other = int(np.argmax(want.values)), int(np.argmax(got.values))
        if top != other and float(want.values[top]) - float(want.values[other]) > 2 * tolerance * spread:
            return f"the largest score is that of class {other}, and of class {top} where the artifact was built"
    return None


def _spread(answers: Sequence[Answer]) -> float:
    """The standard deviation of all finite numbers of an output; where they are all one, its size; of texts 1."""
    if any(one.values.dtype.kind in "OU" for one in answers):
        return 1.0
    values = np.concatenate([one.values.astype(np.float64) for one in answers])
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 1.0
    return float(finite.std()) or float(np.abs(finite).max()) or 1.0


def _distance(got: Array, want: Array, spread: float) -> float:
    """See `compare`; infinite where one is a number and the other is none."""
    if not want.size:
        return 0.0
    if want.dtype.kind in "OU":
        return float((_bare(got) != _bare(want)).mean())
    if want.dtype.kind != "f":
        return float((got != want).mean())
    mine, theirs = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(theirs)
    if not np.array_equal(np.where(finite, 0, mine), np.where(finite, 0, theirs), equal_nan=True):
        return float("inf")
    if not np.isfinite(mine[finite]).all():
        return float("inf")
    return float(np.sqrt(np.mean(((mine - theirs)[finite] / spread) ** 2))) if finite.any() else 0.0


def _bare(array: Array) -> Array:
    """Texts without the NUL characters at their ends, which a file of numpy's does not keep."""
    return np.array([str(text).rstrip("\0") for text in array], object)
