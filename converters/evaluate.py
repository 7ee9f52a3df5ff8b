"""Runs files on data and scores them, with the runtimes that devices use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from agent.protocol.manifest import Manifest
from agent.runtimes import open_runtime
from agent.runtimes.base import Runtime, RuntimeLoadError
from agent.trial.dataset import Dataset
from agent.trial.scoring import answers, time_rows
from agent.trial.scoring import time_in_turns as turns
from converters.errors import ConversionError
from converters.job import ClassScore, Measurements

LATENCY_SECONDS = 3.0


@dataclass(frozen=True)
class Run:
    """A file's answers on a data set, and its measurements without what needs another run to compare with."""

    first_output: npt.NDArray[Any]
    outputs: dict[str, npt.NDArray[Any]]
    provider: str
    latency_p50_ms: float
    latency_p95_ms: float
    memory_mb: float


def run_file(manifest: Manifest, path: Path, data: Dataset) -> Run:
    """Answer every row, then time single rows.

    Raises:
        ConversionError: when the file does not load or does not take the data.
    """
    before = psutil.Process().memory_info().rss
    try:
        runtime = open_runtime(manifest, path)
    except RuntimeLoadError as error:
        raise ConversionError("bad_model", f"sources: {error.detail}", "sources") from None
    try:
        pieces: dict[str, list[npt.NDArray[Any]]] = {spec.name: [] for spec in manifest.outputs}
        for batch in data.batches(manifest.max_batch):
            for name, value in runtime.run(batch).items():
                pieces[name].append(value if value.ndim else value[None])
        outputs = {name: np.concatenate(parts) for name, parts in pieces.items()}
        memory = (psutil.Process().memory_info().rss - before) / 2**20
        p50, p95 = _latency(runtime, data)
    except ConversionError:
        raise
    except Exception as error:
        raise ConversionError("bad_model", f"sources: running it on the data failed: {str(error)[:400]}") from error
    finally:
        runtime.close()
    first = outputs[manifest.outputs[0].name]
    return Run(first, outputs, runtime.provider, p50, p95, max(memory, 0.0))


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
        float(np.abs(value.astype(np.float64) - source.outputs[name].astype(np.float64)).max(initial=0.0))
        for name, value in run.outputs.items()
        if name in source.outputs and value.shape == source.outputs[name].shape
    ]
    classes: tuple[ClassScore, ...] = ()
    accuracy = None
    if data.labels is not None:
        classes, accuracy = class_scores(data.labels, mine), float((mine == data.labels).mean())
    return Measurements(
        size=size,
        samples=data.rows,
        accuracy=accuracy,
        macro_precision=_mean([one.precision or 0.0 for one in classes]),
        macro_recall=_mean([one.recall or 0.0 for one in classes]),
        macro_f1=_mean([one.f1 or 0.0 for one in classes]),
        classes=classes,
        fidelity=fidelity(run.outputs, source.outputs),
        agreement=float((mine == theirs).mean()) if len(mine) == len(theirs) else 0.0,
        max_difference=max(differences, default=0.0),
        latency_p50_ms=run.latency_p50_ms,
        latency_p95_ms=run.latency_p95_ms,
        memory_mb=run.memory_mb,
        provider=run.provider,
    )


def fidelity(mine: dict[str, npt.NDArray[Any]], source: dict[str, npt.NDArray[Any]]) -> float | None:
    """Share of the variance of a source's answers that another file's explain: the coefficient of determination.

    For nets without labels, whose answers need not be classes: vectors, boxes, signals. Of several outputs the worst
    counts, of those in floating point; None where none is.
    """
    found = []
    for name, value in source.items():
        if value.dtype.kind != "f" or not value.size:
            continue
        if name not in mine or mine[name].shape != value.shape:
            return 0.0
        wide = value.astype(np.float64)
        missed = float(((mine[name].astype(np.float64) - wide) ** 2).sum())
        spread = float(((wide - (wide.mean(0) if len(wide) > 1 else wide.mean())) ** 2).sum())
        share = 1.0 if missed == 0 else 1 - missed / spread if spread > 0 else 0.0
        found.append(share if share > 0 else 0.0)  # NaN too
    return min(found, default=None)


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
