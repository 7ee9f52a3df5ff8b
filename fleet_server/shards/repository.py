"""Every query over shard plans."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.db import question
from fleet_server.models import Deployment, Device, Model, Rollout, ShardPlan, Version
from fleet_server.paging import PageRequest, Rows, TableList
from fleet_server.shards.schemas import PlanState

PLANS = TableList(
    ShardPlan.id,
    {"created_at": ShardPlan.id, "state": ShardPlan.state},
    default="-created_at",
    time=ShardPlan.created_at,
)


def plan(session: Session, fleet_id: str, plan_id: str) -> ShardPlan | None:
    """One plan."""
    return session.scalar(select(ShardPlan).where(ShardPlan.fleet_id == fleet_id, ShardPlan.id == plan_id))


def plans_page(
    session: Session, fleet_id: str, request: PageRequest, *, model: str | None, state: str | None
) -> Rows[ShardPlan]:
    """A page of plans."""
    query = select(ShardPlan).where(ShardPlan.fleet_id == fleet_id)
    if model is not None:
        versions = select(Version.id).join(Model, Model.id == Version.model_id)
        query = query.where(ShardPlan.version_id.in_(versions.where(Model.fleet_id == fleet_id, Model.name == model)))
    if state is not None:
        query = query.where(ShardPlan.state == state)
    return PLANS.scalars(session, query, request)


_OPEN = (PlanState.DEPLOYING.value, PlanState.ACTIVE.value)
HAS_OPEN = question(select(ShardPlan.id).where(ShardPlan.state.in_(_OPEN)))


def open_plans(session: Session) -> Sequence[str]:
    """Ids of plans that somebody has to look after."""
    return session.scalars(select(ShardPlan.id).where(ShardPlan.state.in_(_OPEN)).order_by(ShardPlan.id)).all()


def open_plan(session: Session, plan_id: str) -> ShardPlan | None:
    """One of them, locked; None where it is gone, or over by now."""
    query = select(ShardPlan).where(ShardPlan.id == plan_id, ShardPlan.state.in_(_OPEN))
    return session.scalar(query.with_for_update())


def devices(session: Session, ids: Sequence[str]) -> dict[str, Device]:
    """Devices by id, those that were forgotten left out."""
    query = select(Device).where(Device.id.in_(ids), Device.forgotten_at.is_(None))
    return {device.id: device for device in session.scalars(query)}


def rollout_state(session: Session, rollout_id: str) -> str | None:
    """The state of a rollout, if it is there."""
    return session.scalar(select(Rollout.state).where(Rollout.id == rollout_id))


def deployment(session: Session, rollout_id: str, device_id: str) -> Deployment | None:
    """The newest part of a device in a rollout."""
    query = select(Deployment).where(Deployment.rollout_id == rollout_id, Deployment.device_id == device_id)
    return session.scalar(query.order_by(Deployment.id.desc()).limit(1))


def held_devices(session: Session, fleet_id: str) -> set[str]:
    """Devices that have a stage of some plan."""
    query = select(ShardPlan.stages).where(ShardPlan.fleet_id == fleet_id, ShardPlan.state.in_(_OPEN))
    return {str(stage["device"]) for stages in session.scalars(query) for stage in stages}
