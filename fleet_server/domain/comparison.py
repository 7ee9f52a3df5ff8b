"""A cohort beside what it is compared with, each figure with the interval it lies in with 95 % confidence: pure.

These intervals hold for one look. What stops a rollout is `fleet_server.domain.rules`, which holds for any number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from agent.protocol.histogram import bucket_value, percentile
from fleet_server.domain.drift import mean_confidence
from fleet_server.domain.evidence import Sample

Z = 1.959964  # of a normal distribution, two-sided 95 %


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; None where there is nothing to tell."""

    value: float
    low: float
    high: float


def share(hits: int, trials: int) -> Estimate | None:
    """A share in percent, with its score interval (Wilson, Journal of the American Statistical Association, 1927)."""
    if not trials:
        return None
    found, weight = hits / trials, Z * Z / trials
    middle = (found + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(found * (1 - found) / trials + weight / (4 * trials))
    return Estimate(100 * found, 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0))


def latency_ms(sample: Sample, quantile: float) -> Estimate | None:
    """A percentile of the latency in ms, between the order statistics that bound it (Conover, 1999, section 3.2)."""
    total = sum(sample.latency.values())
    value = percentile(sample.latency, quantile)
    if value is None:
        return None
    half = Z * math.sqrt(quantile * (1 - quantile) / total)
    low = percentile(sample.latency, max(quantile - half, 0.0)) or value
    high = percentile(sample.latency, quantile + half) if quantile + half < 1 else bucket_value(max(sample.latency))
    return Estimate(1000 * value, 1000 * low, 1000 * (high or value))


def confidence_percent(sample: Sample) -> Estimate | None:
    """A classifier's mean confidence in percent, with its normal interval."""
    bins = sample.shapes.get("confidence", {})
    mean = mean_confidence(bins)
    total = sum(count for one, count in bins.items() if one >= 0)
    if mean is None:
        return None
    spread = math.sqrt(max(mean * (1 - mean), 0.0) / total)  # no distribution on [0, 1] varies more
    return Estimate(100 * mean, 100 * max(mean - Z * spread, 0.0), 100 * min(mean + Z * spread, 1.0))


FIGURES: dict[str, Callable[[Sample], Estimate | None]] = {
    "error_percent": lambda one: share(one.errors, one.requests),
    "latency_p50_ms": lambda one: latency_ms(one, 0.5),
    "latency_p95_ms": lambda one: latency_ms(one, 0.95),
    "latency_p99_ms": lambda one: latency_ms(one, 0.99),
    "accuracy_percent": lambda one: share(one.correct, one.labelled),
    "confidence_percent": confidence_percent,
    "disagreement_percent": lambda one: share(one.disagreed, one.compared),
}


def compared(now: Sample, before: Sample) -> Iterator[tuple[str, Estimate | None, Estimate | None]]:
    """Each figure that either of the two has: its name, of the cohort, and of what it is compared with."""
    for name, figure in FIGURES.items():
        found, reference = figure(now), figure(before)
        if found is not None or reference is not None:
            yield name, found, reference
