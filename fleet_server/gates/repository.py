"""Every query over gate runs and their trials."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.db import question
from fleet_server.gates.schemas import GateRunState
from fleet_server.models import Device, GateRun, GateTrial
from fleet_server.paging import PageRequest, Rows, TableList

HAS_RUNNING = question(select(GateRun.id).where(GateRun.state == GateRunState.RUNNING.value))
RUNS = TableList(
    GateRun.id,
    {"created_at": GateRun.id, "state": GateRun.state, "deadline_at": GateRun.deadline_at},
    default="-created_at",
    time=GateRun.created_at,
)


def run(session: Session, fleet_id: str, run_id: str) -> GateRun | None:
    """One run."""
    return session.scalar(select(GateRun).where(GateRun.fleet_id == fleet_id, GateRun.id == run_id))


def runs_page(
    session: Session, fleet_id: str, request: PageRequest, *, variant_ids: Sequence[str] | None, state: str | None
) -> Rows[GateRun]:
    """A page of runs."""
    query = select(GateRun).where(GateRun.fleet_id == fleet_id)
    if variant_ids is not None:
        query = query.where(GateRun.variant_id.in_(variant_ids))
    if state is not None:
        query = query.where(GateRun.state == state)
    return RUNS.scalars(session, query, request)


def overdue(session: Session, now: dt.datetime) -> Sequence[GateRun]:
    """Runs that are past their deadline."""
    query = select(GateRun).where(GateRun.state == GateRunState.RUNNING.value, GateRun.deadline_at < now)
    return session.scalars(query.with_for_update(skip_locked=True)).all()


def forgotten(session: Session) -> Sequence[GateTrial]:
    """Trials of running runs whose device was forgotten: nobody will measure them."""
    query = (
        select(GateTrial)
        .join(GateRun, GateRun.id == GateTrial.run_id)
        .join(Device, Device.id == GateTrial.device_id)
        .where(
            GateRun.state == GateRunState.RUNNING.value,
            GateTrial.phase.not_in(("done", "failed")),
            Device.forgotten_at.is_not(None),
        )
    )
    return session.scalars(query.with_for_update(skip_locked=True, of=GateTrial)).all()


def trials(session: Session, run_id: str) -> Sequence[GateTrial]:
    """A run's trials, in the order of their devices."""
    return session.scalars(select(GateTrial).where(GateTrial.run_id == run_id).order_by(GateTrial.device_id)).all()


def online_devices(session: Session, fleet_id: str, profile_id: str, limit: int) -> Sequence[Device]:
    """Devices of a fleet and a profile that are there now."""
    query = select(Device).where(
        Device.fleet_id == fleet_id,
        Device.profile_id == profile_id,
        Device.online.is_(True),
        Device.forgotten_at.is_(None),
    )
    return session.scalars(query.order_by(Device.id).limit(limit)).all()
