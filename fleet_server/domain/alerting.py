"""What alert rules can be about, and when an alert of a rule begins and ends: pure.

A rule looks at subjects (devices, models on devices, rollouts) over and over. Each look gives a subject a reading; how
long readings held decides: pending → firing → resolved. What resolved is over: the next time is another alert.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

UNKNOWN_S = 1800.0  # what fires and of which nothing is known any more is over after so long


class Severity(StrEnum):
    """How much an alert matters, the least first."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"

    def covers(self, other: Severity) -> bool:
        """Whether this is at least as severe."""
        order = list(Severity)
        return order.index(self) >= order.index(other)


class Of(StrEnum):
    """What a metric is of."""

    DEVICE = "device"
    MODEL = "model"  # a model on a device
    ROLLOUT = "rollout"


class Metric(StrEnum):
    """What a rule looks at."""

    OFFLINE = "offline"
    TEMPERATURE_C = "temperature_c"
    CPU_PERCENT = "cpu_percent"
    MEMORY_PERCENT = "memory_percent"
    AGENT_MEMORY_MB = "agent_memory_mb"
    DISK_FREE_MB = "disk_free_mb"
    CERTIFICATE_DAYS = "certificate_days"
    CERTIFICATE_PERCENT = "certificate_percent"
    LATENCY_P50_MS = "latency_p50_ms"
    LATENCY_P95_MS = "latency_p95_ms"
    LATENCY_P99_MS = "latency_p99_ms"
    ERROR_PERCENT = "error_percent"
    REJECTED_PERCENT = "rejected_percent"
    THROUGHPUT_PER_S = "throughput_per_s"
    ACCURACY_PERCENT = "accuracy_percent"
    INPUT_DRIFT = "input_drift"
    OUTPUT_DRIFT = "output_drift"
    CONFIDENCE_SHIFT = "confidence_shift"
    FELL_BACK = "fell_back"
    ROLLED_BACK = "rolled_back"
    ROLLOUT_STUCK_S = "rollout_stuck_s"


@dataclass(frozen=True)
class Kind:
    """What a metric is.

    Attributes:
        of: what it is measured of.
        unit: of its values.
        said: what it is, for people.
        below: whether low values are bad.
        counted: whether a value is compared with a threshold; else the rule holds wherever there is one.
        known: whether a subject without a value is one of which nothing is known; else it is one that is well.
        window_s: seconds of telemetry that count, unless a rule says otherwise; 0 where it is what was said last.
        ticks: it is looked at in every so manieth turn.
    """

    of: Of
    unit: str
    said: str
    below: bool = False
    counted: bool = True
    known: bool = False
    window_s: float = 0.0
    ticks: int = 1


_host = partial(Kind, Of.DEVICE, known=True, ticks=3)
_model = partial(Kind, Of.MODEL, known=True, ticks=3, window_s=300.0)
_drift = partial(Kind, Of.MODEL, known=True, ticks=60, window_s=3600.0)
KINDS: dict[Metric, Kind] = {
    Metric.OFFLINE: Kind(Of.DEVICE, "s", "since the device was heard of", counted=False),
    Metric.TEMPERATURE_C: _host("°C", "hottest sensor"),
    Metric.CPU_PERCENT: _host("%", "of all processors"),
    Metric.MEMORY_PERCENT: _host("%", "of the device's memory"),
    Metric.AGENT_MEMORY_MB: _host("MiB", "resident memory of the agent"),
    Metric.DISK_FREE_MB: _host("MiB", "free disk", below=True),
    Metric.CERTIFICATE_DAYS: Kind(Of.DEVICE, "days", "left of the certificate", below=True, ticks=6),
    Metric.CERTIFICATE_PERCENT: Kind(Of.DEVICE, "%", "left of the certificate's time", below=True, ticks=6),
    Metric.LATENCY_P50_MS: _model("ms", "median latency"),
    Metric.LATENCY_P95_MS: _model("ms", "95th percentile of latency"),
    Metric.LATENCY_P99_MS: _model("ms", "99th percentile of latency"),
    Metric.ERROR_PERCENT: _model("%", "of requests failed"),
    Metric.REJECTED_PERCENT: _model("%", "of requests were refused"),
    Metric.THROUGHPUT_PER_S: _model("/s", "requests", below=True),
    Metric.ACCURACY_PERCENT: _model("%", "of labelled rows were right", below=True),
    Metric.INPUT_DRIFT: _drift("PSI", "inputs moved"),
    Metric.OUTPUT_DRIFT: _drift("PSI", "answers moved"),
    Metric.CONFIDENCE_SHIFT: _drift("KS", "confidences moved"),
    Metric.FELL_BACK: Kind(Of.MODEL, "", "another execution provider runs it than was wanted", counted=False),
    Metric.ROLLED_BACK: Kind(Of.MODEL, "", "the device went back by itself", counted=False, window_s=3600.0),
    Metric.ROLLOUT_STUCK_S: Kind(Of.ROLLOUT, "s", "nothing moved, and deployments are under way", ticks=3),
}


class AlertState(StrEnum):
    """Where an alert is."""

    PENDING = "pending"  # the rule's condition holds, not yet for long enough
    FIRING = "firing"
    RESOLVED = "resolved"


class Reading(StrEnum):
    """What one look at a subject said."""

    HOLDS = "holds"  # the condition
    BETWEEN = "between"  # no more than the threshold, and not yet past the bound where it is well again
    CLEAR = "clear"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Bounds:
    """When a value is bad, and when it is well again.

    Attributes:
        threshold: bad beyond this.
        clear: well again on the other side of this; the threshold itself when None.
        below: whether low values are bad.
    """

    threshold: float
    clear: float | None = None
    below: bool = False

    def read(self, value: float) -> Reading:
        """What a value says."""
        sign = -1 if self.below else 1
        if sign * value > sign * self.threshold:
            return Reading.HOLDS
        well = self.threshold if self.clear is None else self.clear
        return Reading.BETWEEN if sign * value > sign * well else Reading.CLEAR


@dataclass(frozen=True)
class Patience:
    """How long a condition must hold before an alert fires, and be over before it resolves, in seconds."""

    for_s: float = 0.0
    keep_s: float = 0.0


@dataclass(frozen=True)
class Standing:
    """Where an alert is.

    Attributes:
        state: it.
        since: when the condition was first seen to hold.
        clearing_since: since when what fires does not hold, or nothing is known of it; None while it does.
    """

    state: AlertState
    since: dt.datetime
    clearing_since: dt.datetime | None = None


def step(standing: Standing | None, reading: Reading, patience: Patience, now: dt.datetime) -> Standing | None:
    """Where an alert is after a look; None where there is none, or where what was pending came to nothing.

    Args:
        standing: before it; None where there was none. What resolved stays so.
        reading: of the subject.
        patience: of the rule.
        now: the time.
    """
    if standing is None:
        if reading is not Reading.HOLDS:
            return None
        return Standing(AlertState.PENDING if patience.for_s > 0 else AlertState.FIRING, now)
    if standing.state is AlertState.PENDING:
        if reading is not Reading.HOLDS:
            return None
        long = (now - standing.since).total_seconds() >= patience.for_s
        return replace(standing, state=AlertState.FIRING) if long else standing
    if standing.state is AlertState.FIRING:
        if reading in {Reading.HOLDS, Reading.BETWEEN}:
            return replace(standing, clearing_since=None)
        since = standing.clearing_since or now
        enough = patience.keep_s if reading is Reading.CLEAR else max(patience.keep_s, UNKNOWN_S)
        over = (now - since).total_seconds() >= enough
        return replace(standing, state=AlertState.RESOLVED if over else AlertState.FIRING, clearing_since=since)
    return standing


@dataclass(frozen=True)
class Move:
    """That an alert of a subject is elsewhere than it was: `before` None is a new one, `after` None one that goes."""

    subject: str
    before: Standing | None
    after: Standing | None


def look(
    known: Mapping[str, Standing],
    readings: Mapping[str, Reading],
    patience: Patience,
    now: dt.datetime,
    *,
    others: Reading,
) -> list[Move]:
    """What moves after a look at all subjects of a rule.

    Args:
        known: alerts of the rule that are pending or fire, by subject.
        readings: of the subjects that there was one of.
        patience: of the rule.
        now: the time.
        others: what is to be thought of a subject without one: that it is well, or that nothing is known.
    """
    moves = []
    for subject in {**known, **readings}:
        before = known.get(subject)
        after = step(before, readings.get(subject, others), patience, now)
        if after != before:
            moves.append(Move(subject, before, after))
    return moves
