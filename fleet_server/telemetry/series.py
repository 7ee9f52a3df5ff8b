"""What a version did over time, in equal steps: percentiles are of all requests of a step, not means of percentiles."""

from __future__ import annotations

import datetime as dt
import re
from collections import defaultdict

from sqlalchemy.orm import Session

from agent.protocol.histogram import percentile
from fleet_server.errors import InvalidError
from fleet_server.settings import Settings
from fleet_server.telemetry import repository
from fleet_server.telemetry.metrics import scores
from fleet_server.telemetry.repository import WindowFilter
from fleet_server.telemetry.schemas import TelemetryPoint, TelemetrySteps
from fleet_server.telemetry.totals import DAY_S, HOUR_S, Total, period_of

POINTS = 1000
SHORTEST_STEP_S = 10
_STEP = re.compile(r"^(\d{1,6})([smhd])$", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": HOUR_S, "d": DAY_S}


def read_step(text: str) -> int:
    """A step such as `5m` in seconds.

    Raises:
        InvalidError: where it is none, or one that hours and days do not divide into.
    """
    found = _STEP.match(text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    whole = seconds <= HOUR_S or seconds % (DAY_S if seconds > DAY_S else HOUR_S) == 0
    if seconds < SHORTEST_STEP_S or not whole:
        raise _invalid("step", "give 10s to 1h, or whole hours up to 1d, or whole days: such as 5m, 6h, 7d")
    return seconds


def span(
    since: dt.datetime | None, until: dt.datetime | None, step_s: int, now: dt.datetime
) -> tuple[dt.datetime, dt.datetime]:
    """A time, moved outwards to whole steps; without `until` up to now, without `since` the 24 steps before.

    Raises:
        InvalidError: where there would be no step, or too many.
    """
    end = _up(until or now, step_s)
    try:
        begin = period_of(since, step_s) if since else end - dt.timedelta(seconds=24 * step_s)
    except OverflowError:
        raise _invalid("step", "24 steps begin before the year 1: give since") from None
    if begin >= end:
        raise _invalid("since", "it must be before until")
    if (end - begin).total_seconds() / step_s > POINTS:
        raise _invalid("step", f"that are more than {POINTS} steps: give a longer step, or less time")
    return begin, end


def series(
    session: Session,
    fleet_id: str,
    settings: Settings,
    wanted: WindowFilter,
    *,
    model: str,
    version: str,
    step_s: int,
    now: dt.datetime,
) -> TelemetrySteps:
    """What a version did from `since` to `until`, both moved outwards to whole steps. Without, the last 24 steps.

    Raises:
        InvalidError: where there would be too many steps, or finer ones than what is kept of that time.
    """
    since, until = span(wanted.since, wanted.until, step_s, now)
    _check_kept(settings, since, step_s, now)
    within = repository.WindowFilter(
        model=model, version=version, device_id=wanted.device_id, devices=wanted.devices, since=since, until=until
    )
    # Roll-ups of hours are finer than such steps, or the same; for finer steps there are the windows themselves.
    read = repository.parts if step_s % HOUR_S == 0 else repository.raw_parts
    totals: dict[dt.datetime, Total] = {}
    seen: dict[dt.datetime, set[int]] = defaultdict(set)
    for part in read(session, fleet_id, within):
        at = period_of(part.ended_at, step_s)
        seen[at].add(part.series_id)
        if at not in totals:
            totals[at] = Total(part.started_at, part.ended_at)
        totals[at].add(part)
    keys = repository.series_of(session, {one for ids in seen.values() for one in ids})
    devices = {at: len({keys[one].device_id for one in ids}) for at, ids in seen.items()}
    points = [_point(at, totals[at], devices[at]) for at in sorted(totals)]
    return TelemetrySteps(model=model, version=version, step_s=step_s, since=since, until=until, points=points)


def _point(at: dt.datetime, total: Total, devices: int) -> TelemetryPoint:
    quality = scores(total.cells)
    p50, p95, p99 = (percentile(total.latency, share) for share in (0.5, 0.95, 0.99))
    return TelemetryPoint(
        at=at,
        requests=total.requests,
        errors=total.errors,
        rejected=total.rejected,
        items=total.items,
        devices=devices,
        latency_p50_ms=None if p50 is None else p50 * 1000,
        latency_p95_ms=None if p95 is None else p95 * 1000,
        latency_p99_ms=None if p99 is None else p99 * 1000,
        labelled=quality.labelled,
        accuracy=quality.accuracy,
    )


def _check_kept(settings: Settings, since: dt.datetime, step_s: int, now: dt.datetime) -> None:
    for finest, days, coarser in (
        (HOUR_S, settings.telemetry_windows_days, "1h"),
        (DAY_S, settings.telemetry_hours_days, "1d"),
    ):
        if step_s % finest and since < now - dt.timedelta(days=days):
            raise _invalid("step", f"what is older than {days:g} days is kept in steps of {coarser}: ask for such")


def _up(at: dt.datetime, step_s: int) -> dt.datetime:
    down = period_of(at, step_s)
    try:
        return down if down == at else down + dt.timedelta(seconds=step_s)
    except OverflowError:
        raise _invalid("until", "no such time; give an earlier one") from None


def _invalid(field: str, detail: str) -> InvalidError:
    return InvalidError("bad_series", f"{field}: {detail}", field=field)
