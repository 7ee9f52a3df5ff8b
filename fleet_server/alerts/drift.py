"""Drift: how far what a model is asked, and what it answers, has moved on a device.

A series (one artifact, brought by one deployment, on one device) is compared with itself: what it was like when it was
first looked at is kept as its reference, and a new version begins with another. Of a device's windows only so many are
read as say enough: a look at 10,000 devices reads some windows of each, wherever they lie in the time that counts.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from fleet_server.alerts.scope import Rows, Scope
from fleet_server.alerts.subjects import Findings, Found, Subject
from fleet_server.alerts.windows import windows
from fleet_server.domain.alerting import Metric
from fleet_server.domain.evidence import Sample, value_of
from fleet_server.domain.strategy import StopMetric
from fleet_server.models import DriftReference, ModelDrift, ModelWindowRow, TelemetrySeries
from fleet_server.rollouts.evidence import shapes
from fleet_server.telemetry.signals import unpack_signals

WINDOWS = 12  # of a device that are read, about
REFERENCE_REQUESTS = 200  # that a reference needs at least
# Groups are numbered in turn, and a device may be in every third: so which are read is drawn by a multiplication.
_FACTOR, _MODULUS = 619, 1009
Span = tuple[dt.datetime, dt.datetime]
METRICS = {
    Metric.INPUT_DRIFT: StopMetric.INPUT_DRIFT,
    Metric.OUTPUT_DRIFT: StopMetric.OUTPUT_DRIFT,
    Metric.CONFIDENCE_SHIFT: StopMetric.CONFIDENCE_SHIFT,
}


@dataclass(frozen=True)
class _Reference:
    requests: int
    shapes: dict[str, dict[int, int]]


@dataclass(frozen=True)
class Figures:
    """How far a series has moved, by all that there is a measure for; None where it says nothing."""

    subject: Subject
    version: str
    series_id: int
    requests: int
    values: Mapping[Metric, float | None]


@dataclass
class Drift:
    """What a look found, and what is to be kept: how far series moved, and those that were looked at first."""

    findings: Findings = field(default_factory=dict)
    references: dict[int, Sample] = field(default_factory=dict)
    figures: list[Figures] = field(default_factory=list)


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Reference)


def recent(scope: Scope) -> Rows:
    """Some windows of each series."""
    share = math.ceil(_MODULUS * WINDOWS * scope.interval_s / scope.spec.seconds)
    drawn = (ModelWindowRow.group_id * _FACTOR) % _MODULUS < share
    query = windows(scope, TelemetrySeries.version, TelemetrySeries.id, ModelWindowRow.requests, ModelWindowRow.signals)
    return query.where(ModelWindowRow.signals.is_not(None), drawn)


def find_drift(scope: Scope) -> Drift:
    """How far the newest series of each model on each device has moved from its reference."""
    newest: dict[Subject, int] = defaultdict(int)
    now: dict[int, Sample] = defaultdict(Sample)
    versions: dict[int, str] = {}
    for device_id, model, version, series_id, requests, signals in scope.session.execute(recent(scope)):
        subject = Subject(device_id, model)
        versions[series_id] = version
        newest[subject] = max(newest[subject], series_id)
        now[series_id] += Sample(requests=requests, shapes=shapes(unpack_signals(signals)))
    query = (
        select(DriftReference.series_id, DriftReference.shapes)
        .join(TelemetrySeries, TelemetrySeries.id == DriftReference.series_id)
        .where(TelemetrySeries.fleet_id == scope.fleet_id)
    )
    wanted = {series_id for series_id in newest.values() if now[series_id].requests >= scope.spec.least_requests}
    known = {row[0]: unpack(row[1]) for row in scope.session.execute(query) if row[0] in wanted}
    found = Drift()
    for subject, series_id in newest.items():
        if series_id not in wanted:
            continue
        sample = now[series_id]
        if series_id not in known:
            if sample.requests >= REFERENCE_REQUESTS and sample.shapes:
                found.references[series_id] = sample
            continue
        values = figures_of(sample, known[series_id])
        found.figures.append(Figures(subject, versions[series_id], series_id, sample.requests, values))
        value = values[scope.spec.metric]
        if value is not None:
            found.findings[subject] = Found(value, f"over a sample of {sample.requests} requests")
    return found


def figures_of(now: Sample, reference: Sample) -> dict[Metric, float | None]:
    """How far a sample is from its reference, by each metric of drift."""
    return {metric: value_of(measured, now, reference) for metric, measured in METRICS.items()}


def keep_figures(session: Session, fleet_id: str, figures: Sequence[Figures], span: Span) -> None:
    """Keep how far models on devices have moved, for whoever wants to see it; what a look before said of them goes."""
    since, at = span
    rows = []
    for one in sorted(figures, key=lambda one: one.series_id):  # in order, so that two looks never wait for each other
        values = {metric.value: value for metric, value in one.values.items()}
        said = [value for value in values.values() if value is not None]
        if said:
            key = {"device_id": one.subject.device_id, "model": one.subject.model, "fleet_id": fleet_id}
            of = {"version": one.version, "series_id": one.series_id, "requests": one.requests}
            rows.append(key | of | values | {"worst": max(said), "since": since, "at": at})
    if rows:
        insert = _dialect(session).insert(ModelDrift.__table__)
        changed = {name: insert.excluded[name] for name in rows[0] if name not in {"device_id", "model"}}
        session.execute(insert.on_conflict_do_update(index_elements=["device_id", "model"], set_=changed), rows)


def keep_references(session: Session, references: dict[int, Sample], now: dt.datetime) -> None:
    """Keep what series are compared with from now on; those that have a reference keep it."""
    rows = [
        {"series_id": series_id, "shapes": _pack(one), "rows": one.requests, "taken_at": now}
        for series_id, one in sorted(references.items())
    ]
    if rows:
        session.execute(_dialect(session).insert(DriftReference.__table__).on_conflict_do_nothing(), rows)


def _dialect(session: Session) -> Any:
    return postgresql if session.get_bind().dialect.name == "postgresql" else sqlite


def _pack(sample: Sample) -> bytes:
    return _ENCODER.encode({"requests": sample.requests, "shapes": sample.shapes})


def unpack(packed: bytes) -> Sample:
    """What is kept of a series: its requests and its shapes."""
    kept = _DECODER.decode(packed)
    return Sample(requests=kept.requests, shapes=kept.shapes)
