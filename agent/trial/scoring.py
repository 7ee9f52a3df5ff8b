"""How answers and times are read off a runtime: the server's converters and the device's trials measure alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from agent.protocol.manifest import TensorSpec
from agent.runtimes.base import Runtime
from agent.trial.dataset import Dataset

LATENCY_RUNS = 200
LEAST_RUNS = 20
WARM_UP = 10
TIMED_ROWS = 16
TURNS = 5
TURN_SECONDS = 0.4


def answering(outputs: Sequence[TensorSpec], answered: Mapping[str, npt.NDArray[Any]]) -> str:
    """The name of the output that a model's choices are read from: the first, but never texts where there is another.

    A classifier that was exported with the names of its classes answers a name first, and the scores after it. Where
    its first output is whole numbers of one axis, as class indices are, the scores count too, if there are some.

    Args:
        outputs: of the manifest, in order.
        answered: by name.
    """
    first = outputs[0].name
    value = answered[first]
    if value.dtype.kind not in "OUiu" or value.ndim > 1:
        return first
    scores = (one.name for one in outputs[1:] if _are_scores(answered[one.name], len(value) if value.ndim else 1))
    numbers = (one.name for one in outputs if answered[one.name].dtype.kind not in "OU")
    return next(scores, next(numbers, first) if value.dtype.kind in "OU" else first)


def _are_scores(value: npt.NDArray[Any], rows: int) -> bool:
    return value.dtype.kind == "f" and value.ndim == 2 and value.shape[0] == rows and value.shape[1] >= 2


def answers(output: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The class a model chose for each row.

    (rows, classes) scores: the largest. (rows,) or (rows, 1): class 1 above 0.5, as of a probability, or the class that
    a whole number names. Anything longer
    counts as scores over its flattened axes. Of texts, which have no order, each is a number that follows from it.
    """
    if not output.size:
        return np.zeros(len(output), np.int64)
    if output.dtype.kind in "OU":
        rows = output.reshape(len(output), -1)
        return np.array([crc32("\0".join(map(str, row)).encode(errors="replace")) for row in rows], np.int64)
    flat = output.reshape(len(output), -1)
    if flat.shape[1] == 1 and output.dtype.kind in "iu":
        return flat[:, 0].astype(np.int64)
    if flat.shape[1] == 1:
        binary: npt.NDArray[np.int64] = (flat[:, 0] > 0.5).astype(np.int64)
        return binary
    chosen: npt.NDArray[np.int64] = flat.argmax(axis=1).astype(np.int64)
    return chosen


def time_rows(runtime: Runtime, data: Dataset, seconds: float) -> npt.NDArray[np.float64]:
    """Times of single rows in ms, after a warm-up: 200, or as many as fit in the seconds, but 20 at least."""
    rows = list(data.part(0, TIMED_ROWS).batches(1))
    for index in range(WARM_UP):
        runtime.run(rows[index % len(rows)])
    times = []
    deadline = time.perf_counter() + seconds
    for index in range(LATENCY_RUNS):
        started = time.perf_counter()
        runtime.run(rows[index % len(rows)])
        times.append((time.perf_counter() - started) * 1000)
        if time.perf_counter() > deadline and index >= LEAST_RUNS:
            break
    return np.array(times)


def time_in_turns(runtimes: Sequence[Runtime], data: Dataset) -> list[tuple[float, float]]:
    """p50 and p95 of single rows in ms: the runtimes take turns, and medians over the rounds count.

    Args:
        runtimes: that ran before.
        data: rows to run.
    """
    rounds = [
        [np.percentile(time_rows(runtime, data, TURN_SECONDS), (50, 95)) for runtime in runtimes] for _ in range(TURNS)
    ]
    medians = np.median(np.array(rounds), axis=0)
    return [(float(p50), float(p95)) for p50, p95 in medians]
