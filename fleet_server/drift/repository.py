"""Every query of drift. Of windows only some are read, wherever they lie: each is found in an index by itself."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, ScalarSelect, Select, func, literal, select, true, union_all
from sqlalchemy.orm import Session

from fleet_server.db import pieces, rows_by
from fleet_server.models import (
    AlertRule,
    Device,
    DriftReference,
    ModelDrift,
    ModelWindowRow,
    TelemetrySeries,
)
from fleet_server.paging import PageRequest, Rows, TableList

DRIFTS = TableList(
    ModelDrift.series_id, {"worst": ModelDrift.worst, "at": ModelDrift.at}, default="-worst", time=ModelDrift.at,
    times="",
)  # fmt: skip
Time = dt.datetime


class OfVersion(NamedTuple):
    """Which series: of a version, and of which devices."""

    fleet_id: str
    model: str
    version: str
    device_id: str | None = None
    devices: ColumnElement[bool] | None = None  # a condition over `devices`


class Extent(NamedTuple):
    """When the first and the last of some windows ended."""

    first: Time
    last: Time


def series_of(session: Session, wanted: OfVersion, most: int) -> dict[int, str]:
    """The devices of series, by the series' ids: the newest so many."""
    series = TelemetrySeries
    query = select(series.id, series.device_id).where(
        series.fleet_id == wanted.fleet_id, series.model == wanted.model, series.version == wanted.version
    )
    if wanted.device_id is not None:
        query = query.where(series.device_id == wanted.device_id)
    query = query.where(series.device_id.in_(_devices(wanted.fleet_id, wanted.devices)))
    return {row[0]: row[1] for row in session.execute(query.order_by(series.id.desc()).limit(most))}


def extents(session: Session, series_ids: Collection[int], since: Time | None, until: Time) -> dict[int, Extent]:
    """When the first and the last window of each series ended, from `since` to `until`; others are left out."""
    found: dict[int, Extent] = {}
    for piece in pieces(sorted(series_ids)):
        rows = session.execute(extents_query(piece, since, until))
        found |= {row[0]: Extent(row[1], row[2]) for row in rows if row[1] is not None and row[2] is not None}
    return found


def extents_query(
    series_ids: Sequence[int], since: Time | None, until: Time
) -> Select[int, Time | None, Time | None]:  # fmt: skip
    """Ids of series, and when the first and the last window of each ended."""
    series, window = TelemetrySeries, ModelWindowRow

    def end(which: ColumnElement[Any]) -> ScalarSelect[Any]:
        query = select(which).where(window.series_id == series.id, window.ended_at < until)
        if since is not None:
            query = query.where(window.ended_at >= since)
        return query.correlate(series).scalar_subquery()

    ends = end(func.min(window.ended_at)), end(func.max(window.ended_at))
    return select(series.id, *ends).where(series.id.in_(series_ids))


def some_windows_query(series_ids: Sequence[int], spans: Sequence[tuple[Time, Time]]) -> Select[int, int, bytes | None]:
    """Series, requests and signals of the first window of each series in each span of time.

    Which windows these are is found first, each by the index (`MATERIALIZED`: a planner must not join all windows).
    """
    series, window = TelemetrySeries, ModelWindowRow
    times = union_all(
        *(select(literal(begin).label("begin"), literal(end).label("end_")) for begin, end in spans)
    ).cte("spans")  # fmt: skip
    first = (
        select(func.min(window.ended_at))
        .where(window.series_id == series.id, window.ended_at >= times.c.begin, window.ended_at < times.c.end_)
        .correlate(series, times)
        .scalar_subquery()
        .label("ended_at")
    )
    picked = select(series.id.label("series_id"), first).select_from(series).join(times, true())
    chosen = picked.where(series.id.in_(series_ids)).cte("picked").prefix_with("MATERIALIZED")
    found = select(window.series_id, window.requests, window.signals).select_from(chosen)
    return found.join(window, (window.series_id == chosen.c.series_id) & (window.ended_at == chosen.c.ended_at))


def references(session: Session, series_ids: Sequence[int]) -> list[tuple[int, bytes, Time]]:
    """What is kept of series: their ids, the packed shapes, and when they were taken."""
    row = DriftReference
    query = select(row.series_id, row.shapes, row.taken_at)
    return [(one[0], one[1], one[2]) for one in rows_by(session, query, row.series_id, series_ids)]


def rules(session: Session, fleet_id: str) -> Sequence[AlertRule]:
    """The fleet's alert rules: few."""
    return session.scalars(select(AlertRule).where(AlertRule.fleet_id == fleet_id).order_by(AlertRule.id)).all()


def drifts(
    session: Session,
    request: PageRequest,
    fleet_id: str,
    *,
    model: str | None = None,
    version: str | None = None,
    device_id: str | None = None,
    devices: ColumnElement[bool] | None = None,
) -> Rows[ModelDrift]:
    """A page of what looks said of models on devices."""
    row = ModelDrift
    query = select(row).where(row.fleet_id == fleet_id, row.device_id.in_(_devices(fleet_id, devices)))
    for column, value in ((row.model, model), (row.version, version), (row.device_id, device_id)):
        if value is not None:
            query = query.where(column == value)
    return DRIFTS.scalars(session, query, request)


def _devices(fleet_id: str, condition: ColumnElement[bool] | None) -> Select[str]:
    known = select(Device.id).where(Device.fleet_id == fleet_id, Device.forgotten_at.is_(None))
    return known if condition is None else known.where(condition)
