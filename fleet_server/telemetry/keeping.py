"""The queries of the keeper: what rolls telemetry up and removes it. What they hold stays held to its end."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

from sqlalchemy import ColumnElement, Select, Table, and_, bindparam, delete, func, insert, select, update
from sqlalchemy.orm import Session

from fleet_server.db import PIECE, pieces, rows_in
from fleet_server.models import (
    HostWindowRow,
    ModelWindowRow,
    TelemetryBatchRow,
    TelemetryFleetTotal,
    TelemetryGroup,
    TelemetryRollup,
    TelemetrySpool,
)
from fleet_server.telemetry.bulk import BatchName
from fleet_server.telemetry.repository import read_parts, window_columns
from fleet_server.telemetry.totals import Part


class Period(NamedTuple):
    """What names a roll-up."""

    series_id: int
    step_s: int
    period_at: dt.datetime


def open_groups(session: Session, before: dt.datetime, *, windows: int) -> list[int]:
    """The oldest groups that are not rolled up, held until the transaction ends: at least one, if there is any.

    Args:
        session: writes.
        before: stored before that.
        windows: how many windows they may have together.
    """
    query = select(TelemetryGroup.id).where(~TelemetryGroup.rolled_up, TelemetryGroup.stored_at < before)
    return _up_to(session, query, windows)


def _up_to(session: Session, query: Select[int], windows: int) -> list[int]:
    held = query.order_by(TelemetryGroup.id).limit(PIECE).with_for_update(skip_locked=True)
    ids = session.scalars(held).all()
    count = select(ModelWindowRow.group_id, func.count()).where(ModelWindowRow.group_id.in_(ids))
    sizes = {row[0]: row[1] for row in session.execute(count.group_by(ModelWindowRow.group_id))}
    found: list[int] = []
    together = 0
    for one in ids:
        together += sizes.get(one, 0)
        if found and together > windows:
            break
        found.append(one)
    return found


def by_fleet(session: Session, groups: Sequence[int]) -> dict[str, list[int]]:
    """Groups by the fleets they are of."""
    found: dict[str, list[int]] = defaultdict(list)
    query = select(TelemetryGroup.fleet_id, TelemetryGroup.id).where(TelemetryGroup.id.in_(groups))
    for fleet_id, one in session.execute(query.order_by(TelemetryGroup.fleet_id, TelemetryGroup.id)):
        found[fleet_id].append(one)
    return dict(found)


def windows_of(session: Session, groups: Sequence[int]) -> Iterator[Part]:
    """Every window of some groups."""
    yield from read_parts(session, [window_columns().where(ModelWindowRow.group_id.in_(groups))])


def take_names(session: Session, groups: Sequence[int]) -> list[tuple[BatchName, str]]:
    """The names of the batches of some groups, with their fleets, taken out."""
    row = TelemetryBatchRow
    removed = (
        delete(row)
        .where(row.group_id.in_(groups))
        .returning(row.device_id, row.spool_id, row.sequence, row.fleet_id)
        .execution_options(synchronize_session=False)
    )
    return [(BatchName(*found[:3]), found[3]) for found in session.execute(removed)]


def keep_spools(
    session: Session, rows: Sequence[tuple[str, str, str, bytes]], known: Collection[tuple[str, str]]
) -> None:
    """Write what is stored of spools.

    Args:
        session: writes, and holds those that are known.
        rows: device, spool, fleet and packed sequences.
        known: devices and spools that have a row.
    """
    of = cast(Table, TelemetrySpool.__table__)
    names = ("device_id", "spool_id", "fleet_id", "stored")
    new = [dict(zip(names, row, strict=True)) for row in rows if row[:2] not in known]
    old = [{"device": row[0], "spool": row[1], "packed": row[3]} for row in rows if row[:2] in known]
    if new:
        session.execute(insert(of), new)
    if old:
        this = and_(of.c.device_id == bindparam("device"), of.c.spool_id == bindparam("spool"))
        session.execute(update(of).where(this).values(stored=bindparam("packed")), old)


def mark_rolled_up(session: Session, groups: Sequence[int]) -> None:
    """Note that the windows of groups are in roll-ups."""
    session.execute(
        update(TelemetryGroup)
        .where(TelemetryGroup.id.in_(groups))
        .values(rolled_up=True)
        .execution_options(synchronize_session=False)
    )


def rollups_of(session: Session, periods: Sequence[Period]) -> list[tuple[Period, Part]]:
    """The roll-ups that are there of some periods, held until the transaction ends."""
    found: list[tuple[Period, Part]] = []
    for piece in pieces(periods):
        found += _held_rollups(session, rows_in(_PERIOD, piece))
    return found


def rollups_before(session: Session, step_s: int, before: dt.datetime, *, limit: int) -> list[tuple[Period, Part]]:
    """Roll-ups of periods of a length that were over before a time, held until the transaction ends."""
    row = TelemetryRollup
    return _held_rollups(
        session, and_(row.step_s == step_s, row.period_at <= before - dt.timedelta(seconds=step_s)), limit=limit
    )


_PERIOD = (TelemetryRollup.series_id, TelemetryRollup.step_s, TelemetryRollup.period_at)


def _held_rollups(
    session: Session, condition: ColumnElement[bool], limit: int | None = None
) -> list[tuple[Period, Part]]:
    row = TelemetryRollup
    columns = (row.busy_s, row.requests, row.errors, row.rejected, row.items, row.latency, row.confusion)
    query = select(row.step_s, row.period_at, row.series_id, row.started_at, row.ended_at, *columns).where(condition)
    query = query.order_by(row.series_id, row.step_s, row.period_at).limit(limit).with_for_update()
    rows = (tuple(one) for one in session.execute(query))
    return [(Period(one[2], one[0], one[1]), Part(*one[2:])) for one in rows]


def keep_rollups(
    session: Session, rows: Sequence[tuple[Period, Mapping[str, object]]], known: Collection[Period]
) -> None:
    """Write roll-ups.

    Args:
        session: writes, and holds those that are known.
        rows: periods and their other columns.
        known: periods that have a row.
    """
    of = cast(Table, TelemetryRollup.__table__)
    new = [{**period._asdict(), **values} for period, values in rows if period not in known]
    old = [
        {"of_series": period.series_id, "of_step": period.step_s, "of_period": period.period_at, **values}
        for period, values in rows
        if period in known
    ]
    if new:
        session.execute(insert(of), new)
    if old:
        this = and_(
            of.c.series_id == bindparam("of_series"),
            of.c.step_s == bindparam("of_step"),
            of.c.period_at == bindparam("of_period"),
        )
        session.execute(update(of).where(this), old)


def remove_rollups(session: Session, periods: Sequence[Period]) -> None:
    """Remove roll-ups."""
    for piece in pieces(periods):
        session.execute(
            delete(TelemetryRollup).where(rows_in(_PERIOD, piece)).execution_options(synchronize_session=False)
        )


def fleet_totals_of(
    session: Session, fleet_id: str, step_s: int, periods: Sequence[dt.datetime]
) -> dict[dt.datetime, TelemetryFleetTotal]:
    """The sums of a fleet that are there of some periods, held until the transaction ends."""
    row = TelemetryFleetTotal
    found: dict[dt.datetime, TelemetryFleetTotal] = {}
    for piece in pieces(periods):
        query = select(row).where(row.fleet_id == fleet_id, row.step_s == step_s, row.period_at.in_(piece))
        found |= {one.period_at: one for one in session.scalars(query.order_by(row.period_at).with_for_update())}
    return found


def remove_fleet_totals(session: Session, step_s: int, before: dt.datetime) -> None:
    """Remove sums of fleets of periods of a length that began before a time."""
    row = TelemetryFleetTotal
    session.execute(delete(row).where(row.step_s == step_s, row.period_at < before))


def empty_groups(session: Session, before: dt.datetime, *, windows: int) -> int:
    """Remove the windows of the oldest groups that are rolled up; how many groups it were.

    Args:
        session: writes.
        before: stored before that.
        windows: how many windows they may have together.
    """
    row = TelemetryGroup
    query = select(row.id).where(row.rolled_up, ~row.emptied, row.stored_at < before)
    groups = _up_to(session, query, windows)
    if groups:
        quick = {"synchronize_session": False}
        of_groups = ModelWindowRow.group_id.in_(groups)
        session.execute(delete(ModelWindowRow).where(of_groups).execution_options(**quick))
        session.execute(update(row).where(row.id.in_(groups)).values(emptied=True).execution_options(**quick))
        session.execute(delete(row).where(row.emptied, row.id < groups[-1]).execution_options(**quick))
    return len(groups)


def remove_hosts(session: Session, before: dt.datetime, *, limit: int) -> int:
    """Remove the oldest host windows that ended before a time; how many it were."""
    row = HostWindowRow
    oldest = select(row.id).where(row.ended_at < before).order_by(row.ended_at).limit(limit)
    ids = session.scalars(oldest).all()
    for piece in pieces(ids):
        session.execute(delete(row).where(row.id.in_(piece)).execution_options(synchronize_session=False))
    return len(ids)
