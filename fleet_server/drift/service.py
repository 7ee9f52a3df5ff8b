"""Rules of drift to look at: which windows are read, and what they are compared with.

A comparison reads some devices, and some windows of each, however long the time and however large the fleet. Both
sides are of the same devices, so that a device that is off is not taken for drift.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy.orm import Session

from agent.protocol.histogram import merge
from agent.protocol.limits import LIMITS
from fleet_server.alerts.drift import METRICS, figures_of, unpack
from fleet_server.alerts.schemas import RuleSpec
from fleet_server.domain.alerting import KINDS, Metric
from fleet_server.domain.distributions import INPUT, OUTPUT, Bin, Name
from fleet_server.domain.evidence import Sample
from fleet_server.drift import repository
from fleet_server.drift.repository import Extent, OfVersion
from fleet_server.drift.schemas import (
    DriftBin,
    DriftDistribution,
    DriftFigure,
    DriftNow,
    DriftReferenceView,
    DriftRow,
    DriftView,
    Source,
)
from fleet_server.errors import InvalidError
from fleet_server.models import ModelDrift
from fleet_server.rollouts.evidence import shapes
from fleet_server.telemetry.signals import unpack_signals

SPAN = dt.timedelta(hours=1)  # that is looked at, unless somebody says otherwise
SERIES = 10_000  # of a version that devices are drawn from, the newest
DEVICES = 200  # whose windows are read
WINDOWS = 2_000  # that are read of them together
MOST_WINDOWS = 400  # of one series: of an hour in windows of 10 s all; SQLite takes 500 spans
Time = dt.datetime
ValueT = TypeVar("ValueT")


@dataclass
class Side:
    """One side of a comparison, as windows are added to it.

    Attributes:
        source: what it is, of a reference.
        since: of its windows, or when the first of it was kept.
        until: likewise.
        requests: of them.
        devices: that there is something of.
        shapes: histograms by the names that `Sample` has for them.
    """

    source: Source = Source.NONE
    since: Time | None = None
    until: Time | None = None
    requests: int = 0
    devices: set[str] = field(default_factory=set)
    shapes: dict[str, dict[int, int]] = field(default_factory=dict)

    def add(self, device_id: str, requests: int, found: Mapping[str, Mapping[int, int]]) -> None:
        """Add what one device did."""
        self.devices.add(device_id)
        self.requests += requests
        for name, counts in found.items():
            merge(self.shapes.setdefault(name, {}), counts)

    @property
    def sample(self) -> Sample:
        """As alert rules take it."""
        return Sample(requests=self.requests, shapes=self.shapes)


def compare(
    session: Session,
    wanted: OfVersion,
    labels: Sequence[str],
    *,
    since: Time | None,
    until: Time | None,
    now: Time,
) -> DriftView:
    """A version in a time, by default the last hour, beside what the same version was like at first.

    Args:
        session: to read with.
        wanted: which version and devices.
        labels: names of its classes.
        since: windows that ended from then.
        until: to then.
        now: the time.

    Raises:
        InvalidError: where `since` is not before `until`.
    """
    end = until or now
    try:
        begin = since or end - SPAN
    except OverflowError:
        raise _invalid("until", "no such time; give a later one") from None
    if begin >= end:
        raise _invalid("since", "it must be before until")
    of = repository.series_of(session, wanted, SERIES)
    active = repository.extents(session, of, begin, end)
    drawn = set(_spread(sorted({of[one] for one in active or of}), DEVICES))
    mine = {one: device for one, device in of.items() if device in drawn}
    looked_at = Side(since=begin, until=end)
    _read(session, looked_at, mine, {one: extent for one, extent in active.items() if one in mine})
    reference = _kept(session, mine) or _first(session, mine, begin, end - begin) or Side()
    return _view(wanted, labels, looked_at, reference, Thresholds(session, wanted.fleet_id).of(wanted.model))


class Thresholds:
    """Of each metric of drift the lowest threshold among a fleet's alert rules, and that rule's name.

    Rules that are off, or of some devices alone, don't count.
    """

    def __init__(self, session: Session, fleet_id: str) -> None:
        specs = [(one.name, RuleSpec.model_validate(one.spec)) for one in repository.rules(session, fleet_id)]
        self._rules = [
            (spec.threshold, name, spec)
            for name, spec in specs
            if spec.metric in METRICS and spec.enabled and not spec.low and spec.query is None
            if spec.threshold is not None
        ]

    def of(self, model: str) -> dict[Metric, tuple[float, str]]:
        """Those of a model."""
        found: dict[Metric, tuple[float, str]] = {}
        for threshold, name, spec in self._rules:
            lowest = found.get(spec.metric)
            if spec.model in {None, model} and (lowest is None or threshold < lowest[0]):
                found[spec.metric] = threshold, name
        return found


def row(drift: ModelDrift, thresholds: Thresholds) -> DriftRow:
    """The HTTP shape of what a look said of a model on a device."""
    bounds = thresholds.of(drift.model)
    values = {metric: getattr(drift, metric.value) for metric in METRICS}
    over = any(value is not None and metric in bounds and value > bounds[metric][0] for metric, value in values.items())
    names = DriftRow.model_fields.keys() - {"over"}
    return DriftRow.model_validate({name: getattr(drift, name) for name in names} | {"over": over})


def _read(session: Session, side: Side, of: Mapping[int, str], extents: Mapping[int, Extent]) -> None:
    """Add windows of series, spread evenly over the time in which they have any, about as many of each."""
    if not extents:
        return
    chosen = _spread(sorted(extents), WINDOWS)
    count = min(max(WINDOWS // len(chosen), 1), MOST_WINDOWS)
    begin = min(extents[one].first for one in chosen)
    end = max(extents[one].last for one in chosen) + dt.timedelta(microseconds=1)
    edges = [begin + (end - begin) * one / count for one in range(count)] + [end]
    for series_id, requests, signals in session.execute(
        repository.some_windows_query(chosen, list(itertools.pairwise(edges)))
    ):
        side.add(of[series_id], requests, shapes(unpack_signals(signals)))


def _kept(session: Session, of: Mapping[int, str]) -> Side | None:
    """What alert rules kept of these series when they first looked at them."""
    side = Side(Source.KEPT)
    for series_id, packed, taken_at in repository.references(session, _spread(sorted(of), WINDOWS)):
        sample = unpack(packed)
        side.add(of[series_id], sample.requests, sample.shapes)
        side.since, side.until = min(side.since or taken_at, taken_at), max(side.until or taken_at, taken_at)
    return side if side.devices else None


def _first(session: Session, of: Mapping[int, str], before: Time, length: dt.timedelta) -> Side | None:
    """The first windows that there are, over so long a time, as long as they are not those that are looked at."""
    known = repository.extents(session, of, None, before)
    if not known:
        return None
    since = min(one.first for one in known.values())
    until = since + min(length, before - since)
    side = Side(Source.FIRST_WINDOWS, since, until)
    _read(session, side, of, repository.extents(session, known, since, until))
    return side


def _view(
    wanted: OfVersion,
    labels: Sequence[str],
    now: Side,
    reference: Side,
    bounds: Mapping[Metric, tuple[float, str]],
) -> DriftView:
    values = figures_of(now.sample, reference.sample)
    found = [
        _distribution(name, reference.shapes.get(name, {}), now.shapes.get(name, {}), labels)
        for name in _bounded(reference.shapes, now.shapes)
    ]
    assert now.since is not None
    assert now.until is not None
    return DriftView(
        model=wanted.model,
        version=wanted.version,
        now=DriftNow(since=now.since, until=now.until, requests=now.requests, devices=len(now.devices)),
        reference=DriftReferenceView(
            source=reference.source,
            since=reference.since,
            until=reference.until,
            requests=reference.requests,
            devices=len(reference.devices),
        ),
        figures=[_figure(metric, value, bounds.get(metric)) for metric, value in values.items()],
        distributions=sorted(found, key=lambda one: -1.0 if one.distance is None else one.distance, reverse=True),
    )


def _figure(metric: Metric, value: float | None, bound: tuple[float, str] | None) -> DriftFigure:
    threshold, rule = bound or (None, None)
    measure = "ks" if KINDS[metric].unit == "KS" else "psi"
    return DriftFigure.model_validate(
        {"metric": metric, "measure": measure, "value": value, "threshold": threshold, "rule": rule}
    )


def _distribution(
    text: str, before: Mapping[int, int], now: Mapping[int, int], labels: Sequence[str]
) -> DriftDistribution:
    name = Name.of(text)
    old, new = sum(before.values()), sum(now.values())
    fields = {"kind": name.kind, "tensor": name.tensor, "part": name.part, "measure": name.measure}
    return DriftDistribution.model_validate(
        fields
        | {
            "distance": name.distance(before, now),
            "reference_rows": old,
            "now_rows": new,
            "bins": [_bin(one, old, new) for one in name.bins(before, now, labels)],
        }
    )


def _bin(one: Bin, before: int, now: int) -> DriftBin:
    return DriftBin(
        label=one.label,
        low=one.low,
        high=one.high,
        reference=one.before / before if before else None,
        now=one.now / now if now else None,
    )


def _bounded(*sides: Mapping[str, Mapping[int, int]]) -> list[str]:
    """Names of histograms, of as many tensors as a model may have sketches of: a device may send any names."""
    rows: dict[tuple[str, str], int] = {}
    names = sorted({name for side in sides for name in side})
    for text in names:
        name = Name.of(text)
        if name.kind in {INPUT, OUTPUT} and name.tensor is not None:
            count = sum(sum(side.get(text, {}).values()) for side in sides)
            rows[name.kind, name.tensor] = max(rows.get((name.kind, name.tensor), 0), count)
    kept = set()
    for kind in (INPUT, OUTPUT):
        of_kind = sorted((one for one in rows if one[0] == kind), key=lambda one: (-rows[one], one))
        kept |= set(of_kind[: LIMITS.sketched_tensors])
    return [text for text in names if (one := Name.of(text)).tensor is None or (one.kind, one.tensor) in kept]


def _spread(values: Sequence[ValueT], most: int) -> list[ValueT]:
    """At most so many, at even distances."""
    count = min(len(values), most)
    return [values[one * len(values) // count] for one in range(count)]


def _invalid(name: str, detail: str) -> InvalidError:
    return InvalidError("bad_series", f"{name}: {detail}", field=name)
