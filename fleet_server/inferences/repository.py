"""Which devices may answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from agent.protocol.manifest import Manifest
from fleet_server.devices.selection import condition, read_query
from fleet_server.models import Device, DeviceAttribute, DeviceIdentity, Model, ShardPlan, Variant, Version

ACTIVE = "active"  # fleet_server.shards.schemas.PlanState


def has_model(session: Session, fleet_id: str, model: str) -> bool:
    """Whether a fleet has a model of that name."""
    return session.scalar(select(Model.id).where(Model.fleet_id == fleet_id, Model.name == model)) is not None


def serving(session: Session, fleet_id: str, model: str, target: str | None, *, most: int) -> Sequence[Device]:
    """Devices that are online, not locked out, and serve a model, by id.

    Args:
        session: to read in.
        fleet_id: whose devices.
        model: its name.
        target: only devices that this query holds for.
        most: how many at most.

    Raises:
        InvalidError: for a target that can't be read.
    """
    serve = select(DeviceAttribute.device_id).where(
        DeviceAttribute.fleet_id == fleet_id, DeviceAttribute.name == "model", DeviceAttribute.text == model
    )
    query = _reachable(fleet_id, target).where(Device.id.in_(serve))
    return session.scalars(query.order_by(Device.id).limit(most)).all()


def manifest(session: Session, fleet_id: str, digest: str) -> Manifest | None:
    """Of an artifact that the fleet's server has made."""
    query = select(Variant.manifest).where(Variant.fleet_id == fleet_id, Variant.digest == digest)
    found = session.scalar(query.limit(1))
    return None if found is None else msgspec.convert(found, Manifest)


def shard_plan(session: Session, fleet_id: str, model: str, version: str | None) -> tuple[str, Sequence[Any]] | None:
    """The version, and stages in their order, of the newest shard plan of a model whose stages all serve."""
    query = (
        select(Version.name, ShardPlan.stages)
        .join(Version, Version.id == ShardPlan.version_id)
        .join(Model, Model.id == Version.model_id)
        .where(ShardPlan.fleet_id == fleet_id, ShardPlan.state == ACTIVE, Model.name == model)
    )
    if version is not None:
        query = query.where(Version.name == version)
    found = session.execute(query.order_by(ShardPlan.id.desc()).limit(1)).first()
    return None if found is None else (found[0], found[1])


def online(session: Session, fleet_id: str, ids: Sequence[str], target: str | None) -> dict[str, Device]:
    """Of these devices those that are online, not locked out, and that a query holds for, by id."""
    query = _reachable(fleet_id, target).where(Device.id.in_(ids))
    return {device.id: device for device in session.scalars(query)}


def _reachable(fleet_id: str, target: str | None) -> Select[Device]:
    """Devices that are online and not locked out, and that a query holds for."""
    locked = select(DeviceIdentity.device_id).where(DeviceIdentity.revoked_at.is_not(None))
    query = select(Device).where(
        Device.fleet_id == fleet_id, Device.online, Device.forgotten_at.is_(None), Device.id.not_in(locked)
    )
    return query if target is None else query.where(condition(read_query(target, "target"), fleet_id))
