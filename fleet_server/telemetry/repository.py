"""Every query over telemetry."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.models import HostWindowRow, ModelWindowRow, TelemetryBatchRow
from fleet_server.paging import PageRequest, Rows, TableList

HOSTS = TableList(
    HostWindowRow.id,
    {"received_at": HostWindowRow.id, "at": HostWindowRow.ended_at},
    default="-received_at",
    time=HostWindowRow.ended_at,
    times="",
)


@dataclass(frozen=True)
class WindowFilter:
    """Which windows: everything that is not None must hold."""

    model: str | None = None
    version: str | None = None
    device_id: str | None = None
    deployment_ids: Sequence[str] | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None


def has_batch(session: Session, device_id: str, spool_id: str, sequence: int) -> bool:
    """Whether a batch is stored already."""
    query = select(TelemetryBatchRow.id).where(
        TelemetryBatchRow.device_id == device_id,
        TelemetryBatchRow.spool_id == spool_id,
        TelemetryBatchRow.sequence == sequence,
    )
    return session.scalar(query) is not None


def model_windows(session: Session, fleet_id: str, wanted: WindowFilter) -> Iterator[ModelWindowRow]:
    """Windows in the order they ended, read in pieces."""
    query = select(ModelWindowRow).where(ModelWindowRow.fleet_id == fleet_id).order_by(ModelWindowRow.ended_at)
    for column, value in (
        (ModelWindowRow.model, wanted.model),
        (ModelWindowRow.version, wanted.version),
        (ModelWindowRow.device_id, wanted.device_id),
    ):
        if value is not None:
            query = query.where(column == value)
    if wanted.deployment_ids is not None:
        query = query.where(ModelWindowRow.deployment_id.in_(wanted.deployment_ids))
    if wanted.since is not None:
        query = query.where(ModelWindowRow.ended_at >= wanted.since)
    if wanted.until is not None:
        query = query.where(ModelWindowRow.ended_at < wanted.until)
    yield from session.scalars(query.execution_options(yield_per=1000))


def host_windows(session: Session, fleet_id: str, request: PageRequest, device_id: str | None) -> Rows[HostWindowRow]:
    """A page of host windows."""
    query = select(HostWindowRow).where(HostWindowRow.fleet_id == fleet_id)
    if device_id is not None:
        query = query.where(HostWindowRow.device_id == device_id)
    return HOSTS.scalars(session, query, request)
