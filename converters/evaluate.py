"""Runs files on data and scores them, with the runtimes that devices use."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import psutil

from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import Manifest
from agent.runtimes import open_runtime
from agent.runtimes.base import Runtime, RuntimeLoadError, Tensors, reason
from agent.trial.dataset import Array, Dataset
from agent.trial.golden import Answer, answer_rows
from agent.trial.scoring import answering, answers, time_rows
from agent.trial.scoring import time_in_turns as turns
from converters.errors import ConversionError
from converters.job import ClassScore, Measurements

LATENCY_SECONDS = 3.0
SPILL_BYTES = 64 << 20
SLICE_ELEMENTS = 1 << 21
ROUNDING = 1e-12  # of the squares of an output: what varies by less does not vary, but for float32's rounding
MIXED_ROWS = 4
MIXED_SHARE = 1e-2
_REMEDIES = (
    ("construct locale", ": give its StringNormalizer locale='C', or install that locale here and on the devices"),
    ("IR version", ": save it with an older one (model.ir_version), or update ONNX Runtime here and on the devices"),
    ("released onnx opset", ": export it with an older opset, or update ONNX Runtime here and on the devices"),
    ("find an implementation", ": it has no kernel of that version and dtype: export it in float32 or an older opset"),
    ("No Op registered", ": it does not have that operator: export it with standard ones, or update ONNX Runtime"),
)


@dataclass(frozen=True)
class Run:
    """A file's answers on a data set, and its measurements without what needs another run to compare with.

    Attributes:
        first_output: of every row: the output that choices are read from (`agent.trial.scoring.answering`).
        outputs: of every row, by name; large ones lie in files that are gone with them.
        shapes: of one inference's outputs, by name, with -1 where they were not all of one size.
        provider: that ran it.
        latency_p50_ms: of single rows.
        latency_p95_ms: of single rows.
        memory_mb: what loading and running it added to this process.
        golden: answers to golden rows.
    """

    first_output: Array
    outputs: dict[str, Array]
    shapes: dict[str, tuple[int, ...]]
    provider: str
    latency_p50_ms: float
    latency_p95_ms: float
    memory_mb: float
    golden: tuple[dict[str, Answer], ...] = ()


def run_file(manifest: Manifest, path: Path, data: Dataset, golden: Sequence[Tensors] = ()) -> Run:
    """Answer every row, then time single rows.

    Args:
        manifest: of the file.
        path: of the file.
        data: rows to answer.
        golden: rows whose answers are kept to be compared with a device's.

    Raises:
        ConversionError: when the file does not load or does not take the data.
    """
    before = psutil.Process().memory_info().rss
    runtime = _open(manifest, path)
    try:
        kept = {spec.name: Answers() for spec in manifest.outputs}
        for batch in data.batches(manifest.max_batch):
            for name, value in runtime.run(batch).items():
                kept[name].add(value)
        outputs = {name: answered.whole(data.rows) for name, answered in kept.items()}
        memory = (psutil.Process().memory_info().rss - before) / 2**20
        p50, p95 = _latency(runtime, data)
        kept_answers = answer_rows(runtime, golden)
    except (ConversionError, MemoryError):
        raise
    except Exception as error:
        sizes = ", ".join(f"{name!r} {list(data.row_shape(name))}" for name in data.inputs)
        detail = f"sources: running it on rows of the data ({sizes}) failed: {reason(error)}"
        raise ConversionError("bad_model", detail, "sources") from error
    finally:
        runtime.close()
    shapes = {name: answered.shape for name, answered in kept.items()}
    first = outputs[answering(manifest.outputs, outputs)]
    return Run(first, outputs, shapes, runtime.provider, p50, p95, max(memory, 0.0), kept_answers)


def _open(manifest: Manifest, path: Path) -> Runtime:
    try:
        return open_runtime(manifest, path)
    except RuntimeLoadError as error:
        raise _refused(manifest, error) from None


def _refused(manifest: Manifest, error: RuntimeLoadError) -> ConversionError:
    """The refusal of a file that does not load, or does not run on its example: with a remedy, or with the example."""
    remedy = next((said for mark, said in _REMEDIES if mark in error.detail), "")
    if not remedy and any(spec.example_shape for spec in manifest.inputs):
        sizes = ", ".join(f"{spec.name!r} {list(spec.example_shape or ())}" for spec in manifest.inputs)
        remedy = f" (on {sizes})"
    return ConversionError("bad_model", f"sources: {error.detail}{remedy}", "sources")


def takes(manifest: Manifest, path: Path) -> str | None:
    """None when a file loads and runs on its example; else why it does not.

    Raises:
        ConversionError: when no other example would help.
    """
    try:
        open_runtime(manifest, path).close()
    except RuntimeLoadError as error:
        if error.code is WireErrorCode.RUNTIME_MISSING or any(mark in error.detail for mark, _ in _REMEDIES):
            raise _refused(manifest, error) from None
        return error.detail
    return None


def answers_finitely(manifest: Manifest, path: Path, data: Dataset) -> bool:
    """Whether a file answers each row, and in floating point with finite numbers alone."""
    runtime = _open(manifest, path)
    try:
        return all(
            np.isfinite(value).all()
            for row in data.batches(1)
            for value in runtime.run(row).values()
            if value.dtype.kind == "f"
        )
    except Exception:  # noqa: BLE001 (a runtime raises anything; rows that fail are told of by `run_file`)
        return False
    finally:
        runtime.close()


def rows_mix(manifest: Manifest, path: Path, data: Dataset) -> bool:
    """Whether a batch is answered otherwise than its rows one by one, or not at all.

    A free first axis need not count rows: it may be time, or the atoms of one molecule; and nets are exported with a
    free batch and a reshape to one row. Such a file must never be given two requests at once.
    """
    count = min(MIXED_ROWS, manifest.max_batch, data.rows)
    if count < 2 or data.whole:
        return False
    runtime = _open(manifest, path)
    try:
        rows = [runtime.run(row) for row in data.part(0, count).batches(1)]
        together = runtime.run(next(data.part(0, count).batches(count)))
    except Exception:  # noqa: BLE001 (a runtime raises anything; rows that fail alone are told of by `run_file`)
        return True
    finally:
        runtime.close()
    return any(not _alike(np.concatenate([row[name] for row in rows]), value) for name, value in together.items())


def _alike(rows: Array, batch: Array) -> bool:
    if rows.shape != batch.shape or rows.dtype.kind != "f":
        return rows.shape == batch.shape and float((rows == batch).mean() if rows.size else 1.0) >= 1 - MIXED_SHARE
    scale = float(np.abs(rows[np.isfinite(rows)]).max(initial=0.0)) or 1.0
    return bool(np.allclose(rows, batch, rtol=MIXED_SHARE, atol=MIXED_SHARE * scale, equal_nan=True))


def check_finite(source: Run, rows: int, field: str) -> None:
    """Refuse a source that answers most rows without one finite number in some output.

    Answers like that agree with themselves in every precision, and choices that are read from them are all class 0. A
    few cells may be NaN or infinite on purpose, as the padding of a detector's boxes, and a few rows by accident.

    Args:
        source: the run on real rows: made-up ones may be outside of what a net is made for.
        rows: how many were answered.
        field: of the request that they came in, `evaluation` or `calibration`.

    Raises:
        ConversionError: `bad_model`.
    """
    for name, value in source.outputs.items():
        if value.dtype.kind != "f" or not value.size:
            continue
        told_apart = len(value) == rows
        given = value if told_apart else value.reshape(1, -1)
        step = max(1, SLICE_ELEMENTS // max(1, given[:1].size))
        lost = 0
        for start in range(0, len(given), step):
            piece = given[start : start + step]
            lost += len(piece) - int(np.isfinite(piece).reshape(len(piece), -1).any(1).sum())
        if lost * 2 > len(given):
            told = f"{lost} of {rows}" if told_apart else f"all {rows}"
            detail = (
                f"sources: it answers no finite number in {name!r} for {told} rows of the {field} set: look for NaN in "
                "its weights, give rows that are scaled as in training, or leave that output out of the export"
            )
            raise ConversionError("bad_model", detail, "sources")


class Answers:
    """One output over all batches: in memory while it is small, then in a file that has no name and goes with it.

    An evaluation set may be answered with more than fits in memory (masks, boxes before they are filtered).
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self._pieces: list[Array] = []
        self._waiting = self._written = 0
        self._file: IO[bytes] | None = None
        self._count = 0

    def add(self, value: Array) -> None:
        """Append one inference's answer."""
        if not self._count:
            self.shape, self._dtype = value.shape, value.dtype
        elif value.ndim != len(self.shape):
            raise ValueError(f"an output has {value.ndim} axes for one row and {len(self.shape)} for another")
        elif value.shape != self.shape:
            pairs = zip(value.shape, self.shape, strict=True)
            self.shape = tuple(now if now == before else -1 for now, before in pairs)
        self._count += 1
        self._pieces.append(np.ascontiguousarray(value))
        self._waiting += value.nbytes
        if self._waiting > SPILL_BYTES and value.dtype.kind != "O":  # a file holds no references to texts
            self._spill()

    def whole(self, rows: int) -> Array:
        """All answers: (rows, …) where they can be told apart by rows, and else as they come.

        Where sizes vary from row to row they come in one flat row, as of boxes of which some rows have more.
        """
        size = self._written + sum(piece.size for piece in self._pieces)
        rest = self.shape[1:]
        if -1 in rest:
            shape: tuple[int, ...] = (size,)
        elif self._count == rows and self.shape[:1] not in {(1,), (-1,)}:
            shape = (rows, *self.shape)  # each row's answer is a whole output
        else:
            shape = (-1, *rest) if size or not rest else (0, *rest)
        if self._file is None:
            flat = np.concatenate([piece.ravel() for piece in self._pieces])
            return flat.reshape(shape)
        self._spill()
        mapped = np.memmap(self._file, self._dtype, "r", shape=(size,)).reshape(shape)
        self._file.close()  # what is mapped stays until its last array goes
        return mapped

    def _spill(self) -> None:
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 (goes with the last array that maps it)
        for piece in self._pieces:
            self._file.write(piece.tobytes())
            self._written += piece.size
        self._file.flush()
        self._pieces, self._waiting = [], 0


def _latency(runtime: Runtime, data: Dataset) -> tuple[float, float]:
    p50, p95 = np.percentile(time_rows(runtime, data, LATENCY_SECONDS), (50, 95))
    return float(p50), float(p95)


def time_in_turns(files: list[tuple[Manifest, Path]], data: Dataset) -> list[tuple[float, float]]:
    """p50 and p95 of single rows in ms: the files take turns, and medians over the rounds count.

    Args:
        files: that were run before.
        data: rows to run.
    """
    runtimes = [open_runtime(manifest, path) for manifest, path in files]
    try:
        return turns(runtimes, data)
    finally:
        for runtime in runtimes:
            runtime.close()


def measure(run: Run, source: Run, data: Dataset, size: int) -> Measurements:
    """Score a run against labels (when there are any) and against the source's run."""
    mine, theirs = answers(run.first_output), answers(source.first_output)
    differences = [
        _largest(value, source.outputs[name])
        for name, value in run.outputs.items()
        if name in source.outputs and value.shape == source.outputs[name].shape and value.dtype.kind not in "OU"
    ]
    classes: tuple[ClassScore, ...] = ()
    accuracy = None
    if data.labels is not None:
        fits = mine.shape == data.labels.shape
        classes = class_scores(data.labels, mine) if fits else ()
        accuracy = float((mine == data.labels).mean()) if fits else 0.0
    return Measurements(
        size=size,
        samples=data.rows,
        accuracy=accuracy,
        macro_precision=_mean([one.precision or 0.0 for one in classes]),
        macro_recall=_mean([one.recall or 0.0 for one in classes]),
        macro_f1=_mean([one.f1 or 0.0 for one in classes]),
        classes=classes,
        fidelity=fidelity(run.outputs, source.outputs),
        agreement=float((mine == theirs).mean() if len(mine) else 1) if len(mine) == len(theirs) else 0.0,
        max_difference=max(differences, default=0.0),
        latency_p50_ms=run.latency_p50_ms,
        latency_p95_ms=run.latency_p95_ms,
        memory_mb=run.memory_mb,
        provider=run.provider,
    )


def fidelity(mine: dict[str, Array], source: dict[str, Array]) -> float | None:
    """Share of the variance of a source's answers that another file's explain: the coefficient of determination.

    For nets without labels, whose answers need not be classes: vectors, boxes, signals. Of several outputs the worst
    counts, of those in floating point; None where none is. Where the source answers no number (NaN or an infinity), the
    other file has to answer the same.
    """
    found = []
    for name, value in source.items():
        if value.dtype.kind != "f" or not value.size:
            continue
        if name not in mine or mine[name].shape != value.shape:
            return 0.0
        found.append(_explained(mine[name], value))
    return min(found, default=None)


def _explained(mine: Array, source: Array) -> float:
    """The coefficient of determination of one output, a few rows at a time.

    Each number is compared with its mean over the rows. Where none varies from row to row, as of anchors that a
    detector answers with its boxes, what counts is how they vary among themselves, and of equal ones how large they
    are.
    """
    sums = np.zeros(source.shape[1:] if len(source) > 1 else (), np.float64)
    counts = np.zeros(sums.shape, np.int64)
    squares = 0.0
    axis = 0 if len(source) > 1 else None
    for _, wide in _slices(mine, source):
        finite = np.isfinite(wide)
        numbers = np.where(finite, wide, 0)
        with np.errstate(over="ignore"):
            sums, counts = sums + numbers.sum(axis), counts + finite.sum(axis)
            squares += float((numbers**2).sum())
    mean = sums / np.maximum(counts, 1)
    missed = spread = 0.0
    for got, wide in _slices(mine, source):
        finite = np.isfinite(wide)
        if not np.array_equal(np.where(finite, 0, got), np.where(finite, 0, wide), equal_nan=True):
            return 0.0
        with np.errstate(all="ignore"):
            missed += float((np.where(finite, got - wide, 0) ** 2).sum())
            spread += float((np.where(finite, wide - mean, 0) ** 2).sum())
    total = float(sums.sum())
    overall = squares - total * total / max(int(counts.sum()), 1)
    spread = next((one for one in (spread, overall) if one > ROUNDING * squares), squares)
    share = 1.0 if missed == 0 else 1 - missed / spread if spread > 0 else 0.0
    return share if share > 0 else 0.0  # NaN too


def _largest(mine: Array, source: Array) -> float:
    """The largest difference of two arrays of one shape, where both are numbers."""
    largest = 0.0
    for got, wide in _slices(mine, source):
        with np.errstate(all="ignore"):
            difference = np.abs(got - wide)
        largest = max(largest, float(difference[np.isfinite(difference)].max(initial=0.0)))
    return largest


def _slices(mine: Array, source: Array) -> Iterator[tuple[Array, Array]]:
    """Both in double precision, so many rows at a time that memory stays small."""
    step = max(1, SLICE_ELEMENTS // max(1, source[:1].size))
    for start in range(0, len(source), step):
        yield mine[start : start + step].astype(np.float64), source[start : start + step].astype(np.float64)


def class_scores(labels: npt.NDArray[np.int64], chosen: npt.NDArray[np.int64]) -> tuple[ClassScore, ...]:
    """Precision, recall and F1 of every class that has a label."""
    found = []
    for label in np.unique(labels):
        hits = int(((chosen == label) & (labels == label)).sum())
        guessed, support = int((chosen == label).sum()), int((labels == label).sum())
        precision = hits / guessed if guessed else None
        found.append(ClassScore(int(label), precision, hits / support, 2 * hits / (guessed + support), support))
    return tuple(found)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
