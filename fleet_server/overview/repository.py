"""Every query of the overview: few, grouped, and each over an index that has all it reads."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, delete, distinct, exists, func, select
from sqlalchemy.orm import Session

from agent.protocol.lifecycle import SETTLED, Phase
from fleet_server.catalog.schemas import VariantState
from fleet_server.enrolment.schemas import EnrolmentState
from fleet_server.models import (
    Deployment,
    Device,
    DeviceAttribute,
    Enrolment,
    Fleet,
    FleetSnapshot,
    Model,
    Profile,
    Rollout,
    TelemetryFleetTotal,
    Variant,
    Version,
)

# Of fleet_server.devices.attributes.
PROVIDER, FELL_BACK, VERSION, AGENT_VERSION = "running.provider", "fell_back", "version", "agent_version"
UNSETTLED = ("scheduled", *(phase.value for phase in Phase if phase not in SETTLED))
VALUES = 1000  # of an attribute; devices say what they run, and an honest fleet has fewer


class DeviceGroup(NamedTuple):
    """Devices of one profile (None: of none) that are alike in being online."""

    profile_id: str | None
    online: bool
    devices: int


def device_groups(session: Session, fleet_id: str) -> list[DeviceGroup]:
    """How many devices there are by profile and by whether they are online."""
    columns = (Device.profile_id, Device.online)
    query = select(*columns, func.count()).where(Device.fleet_id == fleet_id, Device.forgotten_at.is_(None))
    return [DeviceGroup(*row) for row in session.execute(query.group_by(*columns))]


def profile_names(session: Session, fleet_id: str) -> dict[str, str]:
    """The names of the fleet's profiles by their ids."""
    return {
        row[0]: row[1]
        for row in session.execute(
            select(Profile.id, Profile.name).where(_of(Profile, fleet_id), Profile.kind == "model")
        )
    }


def attribute_counts(session: Session, fleet_id: str, name: str) -> dict[str, int]:
    """How many devices have each value of an attribute; of very many values the most frequent ones."""
    count = func.count()
    query = select(DeviceAttribute.text, count).where(
        DeviceAttribute.fleet_id == fleet_id, DeviceAttribute.name == name
    )
    rows = session.execute(query.group_by(DeviceAttribute.text).order_by(count.desc()).limit(VALUES))
    return {row[0]: row[1] for row in rows}


def devices_with(session: Session, fleet_id: str, name: str) -> int:
    """How many devices have an attribute, with whatever values."""
    query = select(func.count(distinct(DeviceAttribute.device_id)))
    return session.scalar(query.where(DeviceAttribute.fleet_id == fleet_id, DeviceAttribute.name == name)) or 0


def unsettled_deployments(session: Session, fleet_id: str) -> dict[str, int]:
    """How many deployments that have not settled are in each phase."""
    query = select(Deployment.phase, func.count()).where(_of(Deployment, fleet_id), Deployment.phase.in_(UNSETTLED))
    return {row[0]: row[1] for row in session.execute(query.group_by(Deployment.phase))}


def rollouts_by_state(session: Session, fleet_id: str) -> dict[str, int]:
    """How many rollouts are in each state."""
    query = select(Rollout.state, func.count()).where(_of(Rollout, fleet_id)).group_by(Rollout.state)
    return {row[0]: row[1] for row in session.execute(query)}


def variants_building(session: Session, fleet_id: str) -> int:
    """How many variants are being built, or wait for it."""
    states = (VariantState.QUEUED.value, VariantState.BUILDING.value)
    query = select(func.count()).select_from(Variant)
    return session.scalar(query.where(_of(Variant, fleet_id), Variant.state.in_(states))) or 0


def enrolments_waiting(session: Session, fleet_id: str) -> int:
    """How many devices wait for approval."""
    query = select(func.count()).select_from(Enrolment)
    pending = Enrolment.state == EnrolmentState.PENDING.value
    return session.scalar(query.where(_of(Enrolment, fleet_id), pending)) or 0


def has_model(session: Session, fleet_id: str) -> bool:
    """Whether a version of a model was pushed."""
    query = select(Version.id).join(Model, Model.id == Version.model_id)
    return session.scalar(query.where(_of(Version, fleet_id), Model.kind == "model").limit(1)) is not None


def newest_without_variant(session: Session, fleet_id: str) -> str | None:
    """The newest version, as `model@version`, where nothing was built of it."""
    query = select(Model.name, Version.name, exists().where(Variant.version_id == Version.id))
    query = query.join(Model, Model.id == Version.model_id).where(_of(Version, fleet_id), Model.kind == "model")
    row = session.execute(query.order_by(Version.id.desc()).limit(1)).first()
    return f"{row[0]}@{row[1]}" if row is not None and not row[2] else None


def newest_ready_without_rollout(session: Session, fleet_id: str) -> str | None:
    """The newest version that has a variant that is ready, as `model@version`, where it was never rolled out."""
    ready = (_of(Variant, fleet_id), Variant.state == VariantState.READY.value)
    models = select(Variant.version_id).join(Version, Version.id == Variant.version_id)
    models = models.join(Model, Model.id == Version.model_id).where(*ready, Model.kind == "model")
    newest = models.order_by(Variant.version_id.desc()).limit(1).scalar_subquery()
    query = select(Model.name, Version.name).join(Model, Model.id == Version.model_id).where(Version.id == newest)
    row = session.execute(query.where(~exists().where(Rollout.version_id == Version.id))).first()
    return f"{row[0]}@{row[1]}" if row is not None else None


def telemetry(
    session: Session, fleet_id: str, step_s: int, since: dt.datetime, until: dt.datetime
) -> Sequence[TelemetryFleetTotal]:
    """What the fleet did in the periods of a length that begin from `since` to `until`, by time."""
    row = TelemetryFleetTotal
    query = select(row).where(row.fleet_id == fleet_id, row.step_s == step_s)
    return session.scalars(query.where(row.period_at >= since, row.period_at < until).order_by(row.period_at)).all()


def snapshots(session: Session, fleet_id: str, since: dt.datetime, until: dt.datetime) -> Sequence[FleetSnapshot]:
    """How the fleet was in the hours from `since` to `until`, by time."""
    row = FleetSnapshot
    query = select(row).where(row.fleet_id == fleet_id, row.hour_at >= since, row.hour_at < until)
    return session.scalars(query.order_by(row.hour_at)).all()


def fleets_without_snapshot(session: Session, hour_at: dt.datetime) -> Sequence[str]:
    """Fleets that nothing is kept of in an hour."""
    kept = exists().where(FleetSnapshot.fleet_id == Fleet.id, FleetSnapshot.hour_at == hour_at)
    return session.scalars(select(Fleet.id).where(~kept).order_by(Fleet.id)).all()


def forget_snapshots(session: Session, before: dt.datetime) -> None:
    """Remove what is kept of hours before a time."""
    session.execute(delete(FleetSnapshot).where(FleetSnapshot.hour_at < before))


def _of(
    table: type[Deployment | Enrolment | Profile | Rollout | Variant | Version], fleet_id: str
) -> ColumnElement[bool]:
    return table.fleet_id == fleet_id
