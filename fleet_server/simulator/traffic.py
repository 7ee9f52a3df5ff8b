"""What programs ask of a simulated model, and how it answers: drawn a slice of time at once. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from agent.protocol.histogram import merge
from agent.protocol.manifest import Manifest
from agent.protocol.messages import ModelWindow
from agent.protocol.sketch import CONFIDENCE_BINS
from agent.serving.ipc import Counts
from fleet_server.simulator.chances import histogram

DAY_S = 86_400.0
SAMPLED = 10_000
"""Requests of a slice whose latency is drawn one by one; of more, how many fall into each bucket is drawn at once."""
RECENT = 512
ROWS_A_SECOND = 32  # whose confidence the agent notes


@dataclass(frozen=True)
class Load:
    """How a model is asked and answers, at one time on one device.

    Attributes:
        per_s: requests a second.
        median_s: of the latency, in seconds.
        sigma: standard deviation of its logarithm.
        error_rate: share that fails.
        label_share: share of those that did not fail that is labelled later.
        classes: how many labels there are.
        accuracy: share of right answers.
        kinds: how many classes the model knows.
        confidence: mean of how sure it is.
        certainty: of the Beta distribution of that, in pseudo-observations.
    """

    per_s: float
    median_s: float
    sigma: float
    error_rate: float
    label_share: float
    classes: int
    accuracy: float
    kinds: int = 10
    confidence: float = 0.9
    certainty: float = 20.0


@dataclass
class Slice:
    """What happened in some time.

    Attributes:
        requests: answered, errors included.
        errors: of those.
        latency: by bucket.
        confusion: by label and prediction.
        confidence: of a sample of the answers, by bin of `agent.protocol.sketch`.
        predicted: of the same, by class.
    """

    requests: int = 0
    errors: int = 0
    latency: dict[int, int] = field(default_factory=dict)
    confusion: dict[tuple[int, int], int] = field(default_factory=dict)
    confidence: dict[int, int] = field(default_factory=dict)
    predicted: dict[int, int] = field(default_factory=dict)

    def add(self, other: Slice) -> None:
        """Take in what happened after."""
        self.requests += other.requests
        self.errors += other.errors
        merge(self.latency, other.latency)
        merge(self.confidence, other.confidence)
        merge(self.predicted, other.predicted)
        for cell, count in other.confusion.items():
            self.confusion[cell] = self.confusion.get(cell, 0) + count


def swung(per_s: float, swing: float, peak_h: float, unix_s: float) -> float:
    """A rate at a time of the day."""
    return per_s * (1 + swing * math.cos(2 * math.pi * (unix_s - peak_h * 3600) / DAY_S))


def drifted(factor: float, drift: float, drift_s: float, phase: float, unix_s: float) -> float:
    """A factor that goes slowly up and down."""
    return factor * (1 + drift * math.sin(2 * math.pi * (unix_s / drift_s + phase))) if drift else factor


def sample(load: Load, seconds: float, chance: np.random.Generator) -> Slice:
    """What happens in some time: as many requests as a Poisson process has, with lognormal latencies."""
    requests = int(chance.poisson(load.per_s * seconds))
    if not requests:
        return Slice()
    errors = int(chance.binomial(requests, load.error_rate))
    labelled = int(chance.binomial(requests - errors, load.label_share))
    latencies = load.median_s * np.exp(load.sigma * chance.standard_normal(min(requests, SAMPLED)))
    buckets = _grown(histogram(latencies), requests, chance)
    confidence, predicted = _answered(load, min(requests - errors, int(ROWS_A_SECOND * max(seconds, 1.0))), chance)
    return Slice(requests, errors, buckets, _labelled(load, labelled, chance), confidence, predicted)


def _answered(load: Load, rows: int, chance: np.random.Generator) -> tuple[dict[int, int], dict[int, int]]:
    """How sure the model was of a sample of its answers, and what it answered."""
    if rows <= 0:
        return {}, {}
    sure = chance.beta(load.confidence * load.certainty, (1 - load.confidence) * load.certainty, size=rows)
    bins = np.bincount(np.minimum((sure * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1))
    classes = np.bincount(chance.integers(load.kinds, size=rows))
    return (
        {one: n for one, n in enumerate(bins.tolist()) if n},
        {one: n for one, n in enumerate(classes.tolist()) if n},
    )


def _grown(buckets: dict[int, int], requests: int, chance: np.random.Generator) -> dict[int, int]:
    total = sum(buckets.values())
    if total == requests:
        return buckets
    odds: NDArray[np.float64] = np.array(list(buckets.values())) / total
    return {one: n for one, n in zip(buckets, chance.multinomial(requests, odds).tolist(), strict=True) if n}


def _labelled(load: Load, count: int, chance: np.random.Generator) -> dict[tuple[int, int], int]:
    """Labels are alike often; a wrong answer is any other class."""
    if not count:
        return {}
    labels = chance.integers(load.classes, size=count)
    wrong = chance.random(count) >= load.accuracy
    predicted = (labels + wrong * (1 + chance.integers(load.classes - 1, size=count))) % load.classes
    cells, counts = np.unique(labels * load.classes + predicted, return_counts=True)
    return {divmod(cell, load.classes): n for cell, n in zip(cells.tolist(), counts.tolist(), strict=True)}


class Counted:
    """What one loaded artifact did: in this window, since it was loaded, and lately, as the agent counts it."""

    __slots__ = ("_before", "_less_recent", "_recent", "_recently", "_window", "deployment_id", "manifest", "provider")

    def __init__(self, manifest: Manifest, deployment_id: str, provider: str) -> None:
        self.manifest = manifest
        self.deployment_id = deployment_id
        self.provider = provider
        self._window = Slice()
        self._before: Slice | None = Slice()
        self._recent: dict[int, int] = {}
        self._less_recent: dict[int, int] = {}
        self._recently = 0

    def add(self, seen: Slice) -> None:
        """Something happened."""
        self._window.add(seen)
        merge(self._recent, seen.latency)
        self._recently += seen.requests
        if self._recently >= RECENT:
            self._less_recent, self._recent, self._recently = self._recent, {}, 0

    def collect(self) -> ModelWindow | None:
        """The window, and a new one begins; None when nothing happened."""
        seen, self._window = self._window, Slice()
        if self._before is not None:
            self._before.add(Slice(seen.requests, seen.errors, seen.latency))
        if not seen.requests:
            return None
        return ModelWindow(
            model=self.manifest.model,
            version=self.manifest.version,
            digest=self.manifest.digest,
            deployment_id=self.deployment_id,
            provider=self.provider,
            requests=seen.requests,
            errors=seen.errors,
            items=seen.requests,
            latency=seen.latency,
            confusion=tuple((label, predicted, count) for (label, predicted), count in seen.confusion.items()),
            confidence=seen.confidence,
            predicted=seen.predicted,
        )

    def totals(self) -> Counts:
        """Since it was loaded, or lately only where it was watched long ago."""
        total = Slice()
        for part in (self._before, self._window):
            if part is not None:
                total.add(Slice(part.requests, part.errors, part.latency))
        recent: dict[int, int] = dict(self._less_recent)
        merge(recent, self._recent)
        return Counts(
            self.deployment_id, total.requests, total.errors, latency=_sorted(total.latency), recent=_sorted(recent)
        )

    def watched(self) -> None:
        """The watching is over: what was counted since it was loaded is needed no more."""
        self._before = None


def _sorted(buckets: Mapping[int, int]) -> dict[int, int]:
    return dict(sorted(buckets.items()))
