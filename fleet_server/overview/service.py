"""Rules of the overview: what counts, and how hours become steps. Each function works in its caller's transaction."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy.orm import Session

from agent.protocol.histogram import percentile
from agent.protocol.release import version_key
from fleet_server.models import FleetSnapshot, TelemetryFleetTotal
from fleet_server.overview import repository
from fleet_server.overview.repository import AGENT_VERSION, FELL_BACK, PROVIDER, VERSION, DeviceGroup
from fleet_server.overview.schemas import (
    AgentVersionCount,
    DeviceCounts,
    History,
    HistoryPoint,
    Overview,
    ProfileCount,
    ProviderCount,
    TelemetryTotals,
    VersionCount,
)
from fleet_server.overview.steps import Standing, next_steps
from fleet_server.telemetry import series
from fleet_server.telemetry.totals import FLEET_S, HOUR_S, FleetTotal, period_of

HOUR = dt.timedelta(seconds=HOUR_S)


def overview(session: Session, fleet_id: str, now: dt.datetime) -> Overview:
    """A fleet as it is."""
    groups = repository.device_groups(session, fleet_id)
    waiting = repository.enrolments_waiting(session, fleet_id)
    standing = Standing(
        devices=_count(groups),
        unmatched=_count(one for one in groups if one.profile_id is None),
        enrolments=waiting,
        has_model=repository.has_model(session, fleet_id),
        without_variant=repository.newest_without_variant(session, fleet_id),
        ready=repository.newest_ready_without_rollout(session, fleet_id),
    )
    return Overview(
        devices=_devices(session, fleet_id, groups),
        versions=_versions(session, fleet_id),
        agent_versions=_agent_versions(session, fleet_id),
        deployments=repository.unsettled_deployments(session, fleet_id),
        rollouts=repository.rollouts_by_state(session, fleet_id),
        variants_building=repository.variants_building(session, fleet_id),
        enrolments_waiting=waiting,
        telemetry=_last_hour(session, fleet_id, now),
        next_steps=next_steps(standing),
    )


def history(
    session: Session,
    fleet_id: str,
    *,
    since: dt.datetime | None,
    until: dt.datetime | None,
    step_s: int,
    now: dt.datetime,
) -> History:
    """How a fleet was from `since` to `until`, both moved outwards to whole steps. Without, the last 24 steps.

    Raises:
        InvalidError: where there would be no step, or too many.
    """
    begin, end = series.span(since, until, step_s, now)
    known: dict[dt.datetime, FleetSnapshot] = {}
    for one in repository.snapshots(session, fleet_id, begin, end):
        known[period_of(one.hour_at, step_s)] = one  # the last one of a step stays
    totals: dict[dt.datetime, FleetTotal] = defaultdict(FleetTotal)
    for row in repository.telemetry(session, fleet_id, HOUR_S, begin, end):
        totals[period_of(row.period_at, step_s)].add(row.requests, row.errors, row.latency)
    points = [_point(at, known.get(at), totals.get(at, FleetTotal())) for at in sorted({*known, *totals})]
    return History(step_s=step_s, since=begin, until=end, points=points)


def take_snapshot(session: Session, fleet_id: str, now: dt.datetime) -> FleetSnapshot:
    """How a fleet is, as a row of the present hour; it is not added to the session."""
    groups = repository.device_groups(session, fleet_id)
    return FleetSnapshot(
        fleet_id=fleet_id,
        hour_at=period_of(now, HOUR_S),
        devices=_count(groups),
        online=_count(one for one in groups if one.online),
        versions=[one.model_dump() for one in _versions(session, fleet_id)],
    )


def _count(groups: Iterable[DeviceGroup]) -> int:
    return sum(one.devices for one in groups)


def _devices(session: Session, fleet_id: str, groups: Sequence[DeviceGroup]) -> DeviceCounts:
    names = repository.profile_names(session, fleet_id)
    counts = {(one.profile_id, one.online): one.devices for one in groups}
    found = sorted({one.profile_id for one in groups}, key=lambda one: (one is None, names.get(one or "", "")))
    fell_back = repository.attribute_counts(session, fleet_id, FELL_BACK)
    online = _count(one for one in groups if one.online)
    return DeviceCounts(
        total=_count(groups),
        online=online,
        offline=_count(groups) - online,
        fell_back=repository.devices_with(session, fleet_id, FELL_BACK)
        if len(fell_back) > 1
        else sum(fell_back.values()),
        by_profile=[
            ProfileCount(
                profile=None if one is None else names.get(one),
                online=counts.get((one, True), 0),
                offline=counts.get((one, False), 0),
            )
            for one in found
        ],
        by_provider=[
            ProviderCount(provider=provider, devices=count, fell_back=fell_back.get(provider, 0))
            for provider, count in sorted(repository.attribute_counts(session, fleet_id, PROVIDER).items())
        ],
    )


def _versions(session: Session, fleet_id: str) -> list[VersionCount]:
    found = []
    for text, count in sorted(repository.attribute_counts(session, fleet_id, VERSION).items()):
        model, _, version = text.partition("@")
        found.append(VersionCount(model=model, version=version, devices=count))
    return found


def _agent_versions(session: Session, fleet_id: str) -> list[AgentVersionCount]:
    found = repository.attribute_counts(session, fleet_id, AGENT_VERSION)
    newest = sorted(found.items(), key=lambda one: (version_key(one[0]), one[0]), reverse=True)
    return [AgentVersionCount(version=version, devices=count) for version, count in newest]


def _last_hour(session: Session, fleet_id: str, now: dt.datetime) -> TelemetryTotals:
    until = period_of(now, FLEET_S) + dt.timedelta(seconds=FLEET_S)
    total = _sum(repository.telemetry(session, fleet_id, FLEET_S, until - HOUR, until))
    p50, p95, p99 = _percentiles(total)
    return TelemetryTotals(
        since=until - HOUR,
        until=until,
        requests=total.requests,
        errors=total.errors,
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        latency_p99_ms=p99,
    )


def _sum(rows: Iterable[TelemetryFleetTotal]) -> FleetTotal:
    total = FleetTotal()
    for row in rows:
        total.add(row.requests, row.errors, row.latency)
    return total


def _percentiles(total: FleetTotal) -> tuple[float | None, float | None, float | None]:
    p50, p95, p99 = (percentile(total.latency, share) for share in (0.5, 0.95, 0.99))
    return _milliseconds(p50), _milliseconds(p95), _milliseconds(p99)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _point(at: dt.datetime, known: FleetSnapshot | None, total: FleetTotal) -> HistoryPoint:
    p50, p95, p99 = _percentiles(total)
    return HistoryPoint(
        at=at,
        devices=known.devices if known else None,
        online=known.online if known else None,
        versions=[VersionCount.model_validate(one) for one in known.versions] if known else None,
        requests=total.requests,
        errors=total.errors,
        latency_p50_ms=p50,
        latency_p95_ms=p95,
        latency_p99_ms=p99,
    )
