"""Every query over telemetry, but those that write many rows (`bulk`)."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    delete,
    insert,
    null,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session
from sqlalchemy.types import Double

from fleet_server.db import pieces, rows_by, rows_in
from fleet_server.models import (
    Device,
    DeviceIdentity,
    HostWindowRow,
    ModelWindowRow,
    TelemetryBatchRow,
    TelemetryGroup,
    TelemetryRollup,
    TelemetrySeries,
    TelemetrySpool,
)
from fleet_server.paging import PageRequest, Rows, TableList
from fleet_server.telemetry.bulk import BatchName
from fleet_server.telemetry.totals import DAY_S, HOUR_S, Part, period_of

HOSTS = TableList(
    HostWindowRow.id,
    {"received_at": HostWindowRow.id, "at": HostWindowRow.ended_at},
    default="-received_at",
    time=HostWindowRow.ended_at,
    times="",
)
DEPLOYMENTS = 5000
LATE = dt.timedelta(minutes=5)  # by how much a device's clock may be ahead
SEEN_EVERY = dt.timedelta(seconds=2)
_DAY = dt.timedelta(seconds=DAY_S)
_BEGINNING = dt.datetime.min.replace(tzinfo=dt.UTC) + _DAY


class SeriesKey(NamedTuple):
    """What a series is of."""

    device_id: str
    deployment_id: str
    model: str
    version: str
    digest: str
    provider: str


def fleets_of_senders(session: Session, device_ids: Iterable[str]) -> dict[str, str]:
    """The fleets of devices that are known and not locked out."""
    query = (
        select(Device.id, Device.fleet_id)
        .outerjoin(DeviceIdentity, DeviceIdentity.device_id == Device.id)
        .where(DeviceIdentity.revoked_at.is_(None))
    )
    return {row[0]: row[1] for row in rows_by(session, query, Device.id, sorted(device_ids))}


def saw_devices(session: Session, device_ids: Iterable[str], now: dt.datetime) -> None:
    """Note that devices were heard of; those that another transaction is changing are left for the next time."""
    for piece in pieces(sorted(device_ids)):
        stale = Device.last_seen_at.is_(None) | (Device.last_seen_at < now - SEEN_EVERY)
        free = select(Device.id).where(Device.id.in_(piece), stale).with_for_update(skip_locked=True)
        found = session.scalars(free).all()
        if found:
            session.execute(update(Device).where(Device.id.in_(found)).values(last_seen_at=now))


def add_group(session: Session, fleet_id: str, now: dt.datetime) -> int:
    """The id of a new group."""
    values = {"fleet_id": fleet_id, "stored_at": now, "rolled_up": False}
    return session.execute(insert(TelemetryGroup).returning(TelemetryGroup.id), values).scalar_one()


def remove_groups(session: Session, ids: Sequence[int]) -> None:
    """Remove groups that have nothing in them."""
    if ids:
        session.execute(delete(TelemetryGroup).where(TelemetryGroup.id.in_(ids)))


def remove_names(session: Session, names: Collection[BatchName]) -> None:
    """Remove names of batches."""
    for piece in pieces(sorted(names)):
        these = rows_in((TelemetryBatchRow.device_id, TelemetryBatchRow.spool_id, TelemetryBatchRow.sequence), piece)
        session.execute(delete(TelemetryBatchRow).where(these).execution_options(synchronize_session=False))


def stored_sequences(
    session: Session, spools: Collection[tuple[str, str]], *, lock: bool = False
) -> dict[tuple[str, str], bytes]:
    """What the rows of spools say of their sequences; held until the transaction ends, if they are to be changed."""
    found: dict[tuple[str, str], bytes] = {}
    for piece in pieces(sorted(spools)):
        columns = (TelemetrySpool.device_id, TelemetrySpool.spool_id, TelemetrySpool.stored)
        query = select(*columns).where(rows_in(columns[:2], piece))
        if lock:
            query = query.order_by(TelemetrySpool.device_id, TelemetrySpool.spool_id).with_for_update()
        found |= {(row[0], row[1]): row[2] for row in session.execute(query)}
    return found


def series_ids(session: Session, keys: Sequence[SeriesKey], fleets: Mapping[str, str]) -> dict[SeriesKey, int]:
    """The ids of series; those that are not there are added.

    Args:
        session: writes.
        keys: in order, so that two servers that add the same never wait for each other.
        fleets: of their devices.
    """
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    found = _known_series(session, keys)
    absent = [{**key._asdict(), "fleet_id": fleets[key.device_id]} for key in keys if key not in found]
    if absent:
        session.execute(dialect.insert(TelemetrySeries.__table__).on_conflict_do_nothing(), absent)
        found |= _known_series(session, [key for key in keys if key not in found])
    return found


def _known_series(session: Session, keys: Sequence[SeriesKey]) -> dict[SeriesKey, int]:
    columns = [getattr(TelemetrySeries, name) for name in SeriesKey._fields]
    found: dict[SeriesKey, int] = {}
    for piece in pieces(keys):
        rows = session.execute(select(TelemetrySeries.id, *columns).where(rows_in(columns, piece)))
        found |= {SeriesKey(*row[1:]): row[0] for row in rows}
    return found


@dataclass(frozen=True)
class WindowFilter:
    """Which windows: everything that is not None must hold."""

    model: str | None = None
    version: str | None = None
    device_id: str | None = None
    deployment_ids: Sequence[str] | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None
    devices: ColumnElement[bool] | None = None  # a condition over `devices`


def parts(session: Session, fleet_id: str, wanted: WindowFilter) -> Iterator[Part]:
    """Roll-ups, and windows that are not in any: together every window that ended from `since` to `until`, once.

    Of an hour that is asked for in part its windows are read. Where these are gone, or the hour is in a day by now, the
    roll-up counts as one long window: where its last window ended.
    """
    deployments = wanted.deployment_ids
    parted = [None] if deployments is None else list(pieces(deployments, DEPLOYMENTS))
    edges = _edges(session, wanted)
    for piece in parted:
        yield from read_parts(session, _whole(fleet_id, replace(wanted, deployment_ids=piece), edges))


def raw_parts(session: Session, fleet_id: str, wanted: WindowFilter) -> Iterator[Part]:
    """The windows themselves that ended from `since` to `until`, as long as they are kept."""
    yield from read_parts(session, [_windows(fleet_id, wanted)])


def raw_since(session: Session) -> dt.datetime | None:
    """From when on every window is there; None where none was removed yet."""
    query = select(TelemetryGroup.stored_at, TelemetryGroup.emptied).order_by(TelemetryGroup.id).limit(1)
    oldest = session.execute(query).first()
    return oldest[0] + LATE if oldest is not None and oldest[1] else None


def series_of(session: Session, ids: Collection[int]) -> dict[int, SeriesKey]:
    """What series are of."""
    columns = [getattr(TelemetrySeries, name) for name in SeriesKey._fields]
    rows = rows_by(session, select(TelemetrySeries.id, *columns), TelemetrySeries.id, sorted(ids))
    return {row[0]: SeriesKey(*row[1:]) for row in rows}


def _edges(session: Session, wanted: WindowFilter) -> list[dt.datetime]:
    """Hours that are asked for in part and whose windows are there."""
    ends = [one for one in (wanted.since, wanted.until) if one is not None]
    hours = {period_of(one, HOUR_S) for one in ends if period_of(one, HOUR_S) != one}
    raw = raw_since(session) if hours else None
    return sorted(one for one in hours if raw is None or one >= raw)


def _whole(fleet_id: str, wanted: WindowFilter, edges: Sequence[dt.datetime]) -> list[Select[Any]]:
    row = TelemetryRollup
    columns = (row.busy_s, row.requests, row.errors, row.rejected, row.items, row.latency, row.confusion)
    rollups = select(row.series_id, row.started_at, row.ended_at, *columns).where(
        row.series_id.in_(_series(fleet_id, wanted)), *_ended(row.ended_at, wanted)
    )
    # A roll-up's last window ended within its period, and periods are in the index of roll-ups.
    first = wanted.since - _DAY if wanted.since is not None and wanted.since > _BEGINNING else None
    periods = replace(wanted, since=first)
    if wanted.since is not None or wanted.until is not None:
        rollups = rollups.where(row.step_s.in_((HOUR_S, DAY_S)), *_ended(row.period_at, periods))
    selects = [_windows(fleet_id, wanted).where(ModelWindowRow.group_id.in_(_open_groups()))]
    if edges:
        rollups = rollups.where(or_(row.step_s != HOUR_S, row.period_at.not_in(edges)))
        hour = dt.timedelta(seconds=HOUR_S)
        within = [and_(ModelWindowRow.ended_at >= one, ModelWindowRow.ended_at < one + hour) for one in edges]
        selects.append(_windows(fleet_id, wanted).where(ModelWindowRow.group_id.not_in(_open_groups()), or_(*within)))
    return [rollups, *selects]


def _windows(fleet_id: str, wanted: WindowFilter) -> Select[Any]:
    return window_columns().where(
        ModelWindowRow.series_id.in_(_series(fleet_id, wanted)), *_ended(ModelWindowRow.ended_at, wanted)
    )


def window_columns() -> Select[Any]:
    """Windows, with the columns of a `Part`."""
    row = ModelWindowRow
    columns = (row.requests, row.errors, row.rejected, row.items, row.latency, row.confusion)
    return select(row.series_id, row.started_at, row.ended_at, null().cast(Double).label("busy_s"), *columns)


def _series(fleet_id: str, wanted: WindowFilter) -> Select[int]:
    query = select(TelemetrySeries.id).where(TelemetrySeries.fleet_id == fleet_id)
    for column, value in (
        (TelemetrySeries.model, wanted.model),
        (TelemetrySeries.version, wanted.version),
        (TelemetrySeries.device_id, wanted.device_id),
    ):
        if value is not None:
            query = query.where(column == value)
    if wanted.deployment_ids is not None:
        query = query.where(TelemetrySeries.deployment_id.in_(wanted.deployment_ids))
    if wanted.devices is not None:
        found = select(Device.id).where(Device.fleet_id == fleet_id, Device.forgotten_at.is_(None), wanted.devices)
        query = query.where(TelemetrySeries.device_id.in_(found))
    return query


def _open_groups() -> Select[int]:
    return select(TelemetryGroup.id).where(~TelemetryGroup.rolled_up)


def _ended(column: Any, wanted: WindowFilter) -> list[ColumnElement[bool]]:
    found = []
    if wanted.since is not None:
        found.append(column >= wanted.since)
    if wanted.until is not None:
        found.append(column < wanted.until)
    return found


def host_windows(session: Session, fleet_id: str, request: PageRequest, device_id: str | None) -> Rows[HostWindowRow]:
    """A page of host windows."""
    query = select(HostWindowRow).where(HostWindowRow.fleet_id == fleet_id)
    if device_id is not None:
        query = query.where(HostWindowRow.device_id == device_id)
    return HOSTS.scalars(session, query, request)


def read_parts(session: Session, selects: Sequence[Select[Any]]) -> Iterator[Part]:
    """The rows of several queries as one statement: what moves between tables meanwhile is seen in one of them."""
    query = union_all(*selects) if len(selects) > 1 else selects[0]
    for row in session.execute(query.execution_options(yield_per=1000)):
        yield Part(*row)
