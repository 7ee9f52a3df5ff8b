"""How answers and times are read off a runtime: the server's converters and the device's trials measure alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.runtimes.base import Runtime
from agent.trial.dataset import Dataset

LATENCY_RUNS = 200
LEAST_RUNS = 20
WARM_UP = 10
TIMED_ROWS = 16
TURNS = 5
TURN_SECONDS = 0.4


def answers(output: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The class a model chose for each row.

    (rows, classes) scores: the largest. (rows,) or (rows, 1): class 1 above 0.5, as of a probability. Anything longer
    counts as scores over its flattened axes.
    """
    if not output.size:
        return np.zeros(len(output), np.int64)
    flat = output.reshape(len(output), -1)
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
