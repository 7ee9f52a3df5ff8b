"""The worker's part: of what a loaded artifact answers, the rows that may be kept. Thread-safe; it writes no disk.

It is called by the thread that ran the model when the answers are on their way. What goes wrong here ends the
sampling, never a request.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

import numpy as np

from agent.protocol.limits import MIB
from agent.protocol.manifest import Manifest
from agent.protocol.samples import Sampling
from agent.runtimes.base import Array, Tensors
from agent.samples.reservoir import Reservoir, key_of
from agent.samples.sample import Sample, SampleTensor
from agent.serving.tensors import datatype, to_binary
from agent.telemetry.sketches import holds_scores, top_confidence

log = logging.getLogger(__name__)
AT_ONCE = 64  # of one artifact, that the supervisor is handed together
AT_ONCE_BYTES = 8 * MIB


class Sampler:
    """Of one loaded artifact.

    Args:
        manifest: of the artifact.
        sampling: what is to be kept of its model.
        chance: numbers that are even between 0 and 1.
        clock: the present time in Unix seconds.
    """

    def __init__(
        self,
        manifest: Manifest,
        sampling: Sampling,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._manifest = manifest
        self._sampling = sampling
        self._chance = chance
        self._clock = clock
        self._lock = threading.Lock()
        self._failed = False
        self._begin()

    def _begin(self) -> None:
        self._reservoir = Reservoir[Sample](min(self._sampling.samples, AT_ONCE), AT_ONCE_BYTES)

    def offer(self, inputs: Tensors, outputs: Tensors, rows: int) -> None:
        """Rows were answered."""
        if self._failed:
            return
        try:
            self._offer(inputs, outputs, rows)
        except Exception:
            log.exception("%s: no more samples are kept of it", self._manifest.model)
            self._failed = True

    def take(self) -> tuple[Sample, ...]:
        """What was chosen since the last time."""
        with self._lock:
            taken = tuple(entry.value for entry in self._reservoir)
            self._begin()
            return taken

    def _offer(self, inputs: Tensors, outputs: Tensors, rows: int) -> None:
        whole = all(value.shape[:1] == (rows,) for value in (*inputs.values(), *outputs.values()))
        scores = next((outputs[one.name] for one in self._manifest.outputs if holds_scores(outputs[one.name])), None)
        if not whole or scores is None:
            return
        with np.errstate(all="ignore"):
            confidence = top_confidence(scores)
            unsure = np.flatnonzero(confidence < self._sampling.below)
        with self._lock:
            for row in unsure.tolist():
                key = key_of(float(confidence[row]), self._chance())
                if self._reservoir.admits(key):
                    self._choose(inputs, outputs, row, float(confidence[row]), key)

    def _choose(self, inputs: Tensors, outputs: Tensors, row: int, confidence: float, key: float) -> None:
        numbers = sum(value[row].nbytes for value in (*inputs.values(), *outputs.values()) if value.dtype.kind != "O")
        if numbers > self._sampling.sample_bytes:
            return
        one, at = self._manifest, self._clock()
        sample = Sample(
            one.model, one.version, one.digest, at, confidence, key, _tensors(inputs, row), _tensors(outputs, row)
        )
        if sample.bytes <= self._sampling.sample_bytes:
            self._reservoir.add(key, sample.bytes, at, sample)


def _tensors(values: Tensors, row: int) -> tuple[SampleTensor, ...]:
    return tuple(_tensor(name, value[row : row + 1]) for name, value in values.items())


def _tensor(name: str, value: Array) -> SampleTensor:
    return SampleTensor(name, datatype(str(value.dtype)), value.shape, to_binary(value))
