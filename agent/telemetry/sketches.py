"""How a loaded artifact's inputs and answers are spread, for `ModelWindow`: of a sample of the rows. Thread-safe.

Of the rows that come in a second at most `ROWS_A_SECOND` are looked at: each `n`-th, where `n` follows from how many
came in the second before. A request pays for a copy of its sampled rows alone; what is made of them is made for many
at once. Nothing here ever fails a request.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest
from agent.protocol.messages import TensorSketch
from agent.protocol.sketch import (
    CONFIDENCE_BINS,
    LARGEST,
    LOG_GROWTH,
    LOG_SMALLEST,
    NO_NUMBER,
    NOT_FINITE,
    SMALLEST,
    bounded,
    most_common,
)
from agent.runtimes.base import Array, Tensors

log = logging.getLogger(__name__)
ROWS_A_SECOND = 32
TOGETHER = 16  # rows that are made something of at once
NUMBERS = 4096  # of one row that are looked at; of more, those at even distances
ONE = 1e-3  # how far a row of probabilities may be from adding up to 1


@dataclass
class Sketched:
    """Fields of a `ModelWindow`."""

    confidence: dict[int, int] = field(default_factory=dict)
    predicted: dict[int, int] = field(default_factory=dict)
    inputs: dict[str, TensorSketch] = field(default_factory=dict)
    outputs: dict[str, TensorSketch] = field(default_factory=dict)


class Stride:
    """Which of the rows that come are looked at: the same of the same rows at the same times. Not thread-safe."""

    def __init__(self, rows_a_second: int = ROWS_A_SECOND) -> None:
        self._most = rows_a_second
        self._since = -math.inf
        self._stride = 1
        self._came = self._taken = self._number = 0

    def take(self, rows: int, now: float) -> slice:
        """Which of so many rows that came together; the clock is passed in, in seconds."""
        passed = now - self._since
        if passed >= 1.0:
            self._stride = max(1, math.ceil(self._came / passed / self._most))
            self._since, self._came, self._taken = now, 0, 0
        first = -self._number % self._stride
        self._number += rows
        self._came += rows
        count = min(max(0, -(-(rows - first) // self._stride)), self._most - self._taken)
        self._taken += count
        return slice(first, first + count * self._stride, self._stride)


class Sketches:
    """Of one loaded artifact."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._lock = threading.Lock()
        self._stride = Stride()
        self._failed = False
        self._waiting: dict[tuple[str, str], list[Array]] = defaultdict(list)
        self._rows = 0
        self._begin()

    def _begin(self) -> None:
        self._confidence: Counter[int] = Counter()
        self._predicted: Counter[int] = Counter()
        self._means: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
        self._deviations: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)

    def observe(self, inputs: Tensors, outputs: Tensors, rows: int, now: float) -> None:
        """Rows were answered.

        Args:
            inputs: what went in.
            outputs: what came out.
            rows: how many.
            now: seconds of a clock that is never set.
        """
        with self._lock:
            picked = self._stride.take(rows, now)
            if picked.stop <= picked.start or self._failed:
                return
            self._carefully(lambda: self._keep(inputs, outputs, rows, picked))
            if self._rows >= TOGETHER:
                self._carefully(self._digest)

    def collect(self) -> Sketched:
        """The sketches since the last time; new ones begin."""
        with self._lock:
            self._carefully(self._digest)
            found = Sketched(
                dict(self._confidence), most_common(self._predicted), self._side("inputs"), self._side("outputs")
            )
            self._begin()
            return found

    def _carefully(self, step: Callable[[], None]) -> None:
        """Do what must not fail who serves: when it does, this artifact's rows are sketched no more."""
        try:
            step()
        except Exception:
            log.exception("%s: nothing more is sketched of its rows", self._manifest.model)
            self._failed, self._rows = True, 0
            self._waiting.clear()

    def _side(self, side: str) -> dict[str, TensorSketch]:
        names = [name for which, name in self._means if which == side]
        return {
            name: TensorSketch(bounded(self._means[side, name]), bounded(self._deviations[side, name]))
            for name in names[: LIMITS.sketched_tensors]
        }

    def _keep(self, inputs: Tensors, outputs: Tensors, rows: int, picked: slice) -> None:
        for spec in self._manifest.inputs[: LIMITS.sketched_tensors]:
            value = inputs[spec.name]
            if value.dtype.kind in "fiu" and value.shape[:1] == (rows,) and value.size and _is_name(spec.name):
                flat = value.reshape(rows, -1)
                self._waiting["inputs", spec.name].append(flat[picked, :: _step(flat.shape[1])].copy())
        scores = True
        for spec in self._manifest.outputs[: LIMITS.sketched_tensors]:
            value = outputs[spec.name]
            if value.dtype.kind != "f" or value.shape[:1] != (rows,):
                continue
            if value.size == rows and value.ndim <= 2 and _is_name(spec.name):
                self._waiting["outputs", spec.name].append(value.reshape(rows, 1)[picked].copy())
            elif holds_scores(value) and scores:
                scores = False  # the first output that may hold scores of classes is taken for them
                self._waiting["scores", ""].append(value[picked].copy())
        self._rows += len(range(picked.start, picked.stop, picked.step))

    def _digest(self) -> None:
        """Count what waits; the copies go."""
        waiting, self._waiting, self._rows = self._waiting, defaultdict(list), 0
        with np.errstate(all="ignore"):
            for key, pieces in waiting.items():
                for rows in _alike(pieces):
                    if key[0] == "scores":
                        self._count_scores(rows)
                    else:
                        self._count_numbers(key, rows)
        if len(self._predicted) > LIMITS.predicted_classes:
            self._predicted = Counter(most_common(self._predicted))

    def _count_scores(self, scores: Array) -> None:
        confidence = top_confidence(scores)
        numbers = np.isfinite(confidence)
        bins = np.minimum(np.where(numbers, confidence, 0) * CONFIDENCE_BINS, CONFIDENCE_BINS - 1).astype(np.int64)
        self._confidence.update(np.where(numbers, bins, NO_NUMBER).tolist())
        self._predicted.update(scores[numbers].argmax(axis=1).tolist())

    def _count_numbers(self, key: tuple[str, str], rows: Array) -> None:
        means = rows.mean(axis=1)
        self._means[key].update(buckets_of(means).tolist())
        if rows.shape[1] > 1:
            apart = rows - means[:, np.newaxis]
            deviations = np.sqrt(np.einsum("ij,ij->i", apart, apart) / rows.shape[1])
            self._deviations[key].update(buckets_of(deviations).tolist())


def holds_scores(value: Array) -> bool:
    """Whether an output may hold a score for each class of each row."""
    return value.dtype.kind == "f" and value.ndim == 2 and value.shape[1] >= 2


def top_confidence(scores: Array) -> Array:
    """How sure a classifier was of each row's answer: the largest probability, or that of the scores' softmax.

    Args:
        scores: of shape (rows, classes). A row is taken for probabilities when none is negative and they add up to 1
            within 1e-3.

    Returns:
        From 0 to 1; not a number where the scores are none.
    """
    values: Array = scores.astype(np.float64, copy=False)
    top: Array = values.max(axis=1)
    probable = (values.min(axis=1) >= 0) & (np.abs(values.sum(axis=1) - 1) <= ONE)
    if probable.all():
        certain: Array = np.minimum(top, 1.0)
        return certain
    soft = 1 / np.exp(values - top[:, np.newaxis]).sum(axis=1)
    found: Array = np.where(probable, np.minimum(top, 1.0), soft)
    return found


def buckets_of(numbers: Array) -> Array:
    """`agent.protocol.sketch.bucket_of` of many numbers at once."""
    finite = np.isfinite(numbers)
    sizes = np.where(finite, np.abs(numbers), 0)
    places = np.ceil((np.log(np.maximum(sizes, SMALLEST)) - LOG_SMALLEST) / LOG_GROWTH)
    signed = np.copysign(np.minimum(places, LARGEST), numbers)
    found: Array = np.where(finite, signed, NOT_FINITE).astype(np.int64)
    return found


def _alike(pieces: list[Array]) -> list[Array]:
    """Rows of the same length in one array each, as double-precision numbers."""
    widths: dict[int, list[Array]] = defaultdict(list)
    for piece in pieces:
        widths[piece.shape[1]].append(piece)
    return [np.concatenate(alike).astype(np.float64) for alike in widths.values()]


def _step(size: int) -> int:
    """The distance of the numbers of a row that are looked at: one that shares no factor with the row's size.

    Else it might see one of several channels alone.
    """
    step = -(-size // NUMBERS)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def _is_name(name: str) -> bool:
    """Whether the wire takes it."""
    return len(name) <= LIMITS.name_chars and "\0" not in name
