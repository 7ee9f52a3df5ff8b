"""Every query over rollouts and deployments."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import Select, and_, case, func, select, update
from sqlalchemy.orm import Session

from fleet_server.db import pieces, question, rows_by, scalars_by
from fleet_server.devices.attributes import TAG
from fleet_server.domain.states import RolloutState
from fleet_server.models import (
    Deployment,
    Device,
    DeviceAttribute,
    Model,
    ModelWindowRow,
    Profile,
    Rollout,
    TelemetrySeries,
    Variant,
    Version,
)
from fleet_server.paging import PageRequest, Rows, TableList

SCHEDULED = "scheduled"
Row = TypeVar("Row", Deployment, Device, Profile, Rollout, Variant)
OPEN_STATES = (RolloutState.RUNNING.value, RolloutState.PAUSED.value, RolloutState.REVERTING.value)
SETTLED_PHASES = ("active", "failed", "rolled_back", "superseded")
DeploymentRow = tuple[Deployment, Variant, Version, Model, Profile]
_IS_OPEN = Rollout.state.in_((RolloutState.RUNNING.value, RolloutState.REVERTING.value))  # to the engine
HAS_OPEN = question(select(Rollout.id).where(_IS_OPEN))
_LAST = (Deployment.revert_of == "", Deployment.replaced.is_(False))
ROLLOUTS = TableList(
    Rollout.id,
    {"created_at": Rollout.id, "name": Rollout.name, "state": Rollout.state},
    default="-created_at",
    name=Rollout.name,
    time=Rollout.created_at,
)
DEPLOYMENTS = TableList(
    Deployment.id,
    {"created_at": Deployment.id, "device_id": Deployment.device_id, "phase": Deployment.phase},
    default="-created_at",
    time=Deployment.created_at,
)


def rollout(session: Session, fleet_id: str, rollout_id: str, *, lock: bool = False) -> Rollout | None:
    """One rollout; with `lock`, nobody else changes it until this transaction ends."""
    query = select(Rollout).where(Rollout.fleet_id == fleet_id, Rollout.id == rollout_id)
    return session.scalar(query.with_for_update() if lock else query)


def rollouts_page(
    session: Session,
    fleet_id: str,
    request: PageRequest,
    *,
    state: str | None,
    model: str | None,
    version_id: str | None = None,
) -> Rows[Rollout]:
    """A page of rollouts."""
    query = select(Rollout).where(Rollout.fleet_id == fleet_id)
    if state is not None:
        query = query.where(Rollout.state == state)
    if model is not None:
        query = query.join(Version, Version.id == Rollout.version_id).join(Model, Model.id == Version.model_id)
        query = query.where(Model.name == model)
    if version_id is not None:
        query = query.where(Rollout.version_id == version_id)
    return ROLLOUTS.scalars(session, query, request)


def open_rollouts(session: Session) -> Sequence[str]:
    """Ids of rollouts the engine has something to do with."""
    return session.scalars(select(Rollout.id).where(_IS_OPEN).order_by(Rollout.id)).all()


def deployments(session: Session, rollout_id: str) -> Sequence[Deployment]:
    """Every deployment of a rollout, reverts too."""
    return session.scalars(select(Deployment).where(Deployment.rollout_id == rollout_id).order_by(Deployment.id)).all()


def deployments_page(
    session: Session,
    fleet_id: str,
    request: PageRequest,
    *,
    rollout_id: str | None = None,
    device_id: str | None = None,
    model: str | None = None,
    phase: str | None = None,
) -> Rows[DeploymentRow]:
    """A page of deployments."""
    query = (
        select(Deployment, Variant, Version, Model, Profile)
        .join(Variant, Variant.id == Deployment.variant_id)
        .join(Version, Version.id == Deployment.version_id)
        .join(Model, Model.id == Deployment.model_id)
        .join(Profile, Profile.id == Variant.profile_id)
        .where(Deployment.fleet_id == fleet_id)
    )
    if rollout_id is not None:
        query = query.where(Deployment.rollout_id == rollout_id)
    if device_id is not None:
        query = query.where(Deployment.device_id == device_id)
    if model is not None:
        query = query.where(Model.name == model)
    if phase is not None:
        query = query.where(Deployment.phase == phase)
    return DEPLOYMENTS.rows(session, query, request)


class PhaseCount(NamedTuple):
    """Forward deployments of a rollout that are in one phase, and how many of them stand still on purpose."""

    rollout_id: str
    phase: str
    deployments: int
    waiting: int


def counts(session: Session, rollout_ids: Sequence[str]) -> list[PhaseCount]:
    """How many forward deployments of some rollouts are in each phase."""
    waiting = func.sum(case((Deployment.is_waiting, 1), else_=0))
    query = (
        select(Deployment.rollout_id, Deployment.phase, func.count(), waiting)
        .where(Deployment.rollout_id.in_(rollout_ids), *_LAST)
        .group_by(Deployment.rollout_id, Deployment.phase)
    )
    return [PhaseCount(*row) for row in session.execute(query)]


def with_models(session: Session, rollouts: Sequence[Rollout]) -> dict[str, tuple[Version, Model]]:
    """Versions and models of rollouts, by the ids of their versions."""
    query = select(Version, Model).join(Model, Model.id == Version.model_id)
    rows = session.execute(query.where(Version.id.in_({one.version_id for one in rollouts})))
    return {row[0].id: (row[0], row[1]) for row in rows}


def phase_counts(session: Session, rollout_id: str) -> dict[str, int]:
    """How many of a rollout's forward deployments are in each phase."""
    query = select(Deployment.phase, func.count()).where(*_forward(rollout_id)).group_by(Deployment.phase)
    return {row[0]: row[1] for row in session.execute(query)}


def _forward(rollout_id: str) -> tuple[Any, ...]:
    """Of a rollout: what brings the version, the last attempt of each device."""
    return Deployment.rollout_id == rollout_id, *_LAST


def _underway(query: Select[*tuple[Any, ...]], rollout_id: str) -> Select[*tuple[Any, ...]]:
    return query.where(*_forward(rollout_id), Deployment.phase != SCHEDULED, Deployment.phase.not_in(SETTLED_PHASES))


def underway_count(session: Session, rollout_id: str) -> int:
    """How many deployments of a rollout were sent and have not settled."""
    return session.scalar(_underway(select(func.count()).select_from(Deployment), rollout_id)) or 0


def offline_count(session: Session, rollout_id: str) -> int:
    """How many of those are of devices that are offline."""
    query = select(func.count()).select_from(Deployment).join(Device, Device.id == Deployment.device_id)
    return session.scalar(_underway(query, rollout_id).where(Device.online.is_(False))) or 0


def underway_by_value(session: Session, rollout_id: str, tag: str) -> dict[str, int]:
    """How many of those are of devices with each value of a tag."""
    query = (
        select(DeviceAttribute.text, func.count())
        .join(Deployment, Deployment.device_id == DeviceAttribute.device_id)
        .where(DeviceAttribute.name == TAG + tag)
        .group_by(DeviceAttribute.text)
    )
    return {row[0]: row[1] for row in session.execute(_underway(query, rollout_id))}


def due(
    session: Session, rollout_id: str, stage: int, tag: str | None, full: Sequence[str], *, limit: int
) -> list[tuple[Deployment, str | None]]:
    """Deployments of the stages up to one that were not sent, in their order, with their device's value of a tag.

    Args:
        session: to read with.
        rollout_id: of the rollout.
        stage: the last one that is open.
        tag: that has a cap; None when none has.
        full: values of it whose cap is reached: devices with those are left out.
        limit: how many at most.
    """
    value = and_(DeviceAttribute.device_id == Deployment.device_id, DeviceAttribute.name == TAG + (tag or ""))
    query = (
        select(Deployment, DeviceAttribute.text)
        .outerjoin(DeviceAttribute, value)
        .join(Device, Device.id == Deployment.device_id)
        .where(*_forward(rollout_id), Deployment.phase == SCHEDULED, Deployment.stage <= stage, Device.hold.is_(None))
        .order_by(Deployment.stage, Deployment.place, Deployment.id)
        .limit(limit)
    )
    if full:
        query = query.where(DeviceAttribute.text.is_(None) | DeviceAttribute.text.not_in(full))
    return [(row[0], row[1]) for row in session.execute(query)]


def due_counts(session: Session, rollout_id: str, stage: int) -> tuple[int, int]:
    """How many deployments of the stages up to one were not sent: those that may be, and those whose device is held."""
    query = (
        select(Device.hold.is_(None), func.count())
        .select_from(Deployment)
        .join(Device, Device.id == Deployment.device_id)
        .where(*_forward(rollout_id), Deployment.phase == SCHEDULED, Deployment.stage <= stage)
        .group_by(Device.hold.is_(None))
    )
    found = {bool(row[0]): row[1] for row in session.execute(query)}
    return found.get(True, 0), found.get(False, 0)


def held_devices(session: Session, rollout_id: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Devices of a rollout that are held and were not sent it: their ids and holds."""
    query = (
        select(Device.id, Device.hold)
        .join(Deployment, Deployment.device_id == Device.id)
        .where(*_forward(rollout_id), Deployment.phase == SCHEDULED, Device.hold.is_not(None))
        .order_by(Device.id)
    )
    return [(row[0], row[1]) for row in session.execute(query)]


def last_settled_at(session: Session, rollout_id: str) -> dt.datetime | None:
    """When the last deployment of a rollout settled."""
    return session.scalar(select(func.max(Deployment.settled_at)).where(*_forward(rollout_id)))


def failed(session: Session, rollout_id: str, *, alone: bool = False) -> Sequence[Deployment]:
    """Deployments of a rollout that failed; with `alone` not those that their device took back."""
    phases = ("failed",) if alone else ("failed", "rolled_back")
    query = select(Deployment).where(
        *_forward(rollout_id), Deployment.phase.in_(phases), Deployment.sent_at.is_not(None)
    )
    return session.scalars(query.order_by(Deployment.id)).all()


def to_take_back(session: Session, rollout_id: str, *, limit: int) -> Sequence[Deployment]:
    """Deployments of a rollout that their devices still ought to run, the newest of its stages first."""
    query = select(Deployment).where(Deployment.rollout_id == rollout_id, Deployment.revert_of == "")
    query = query.where(Deployment.desired.is_(True)).order_by(Deployment.stage.desc(), Deployment.id)
    return session.scalars(query.limit(limit)).all()


def to_take_back_count(session: Session, rollout_id: str) -> int:
    """How many deployments of a rollout their devices still ought to run."""
    query = select(func.count()).select_from(Deployment)
    query = query.where(Deployment.rollout_id == rollout_id, Deployment.revert_of == "", Deployment.desired.is_(True))
    return session.scalar(query) or 0


def taken_back(session: Session, rollout_id: str) -> Sequence[Deployment]:
    """Deployments that take devices of a rollout back."""
    query = select(Deployment).where(Deployment.rollout_id == rollout_id, Deployment.revert_of != "")
    return session.scalars(query.order_by(Deployment.id)).all()


def sent_by_profile(session: Session, rollout_id: str) -> dict[str, dict[str, int]]:
    """How many deployments that were sent are in each phase, by the name of the profile."""
    query = (
        select(Profile.name, Deployment.phase, func.count())
        .select_from(Deployment)
        .join(Variant, Variant.id == Deployment.variant_id)
        .join(Profile, Profile.id == Variant.profile_id)
        .where(*_forward(rollout_id), Deployment.sent_at.is_not(None))
        .group_by(Profile.name, Deployment.phase)
    )
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for name, phase, count in session.execute(query):
        found[name][phase] = count
    return dict(found)


def fell_back_by_profile(session: Session, rollout_id: str) -> dict[str, int]:
    """How many deployments that settled another execution provider runs than the first wanted, by the profile's name.

    One that ended counts by what ran it last.
    """
    query = (
        select(Profile.name, func.count())
        .select_from(Deployment)
        .join(Variant, Variant.id == Deployment.variant_id)
        .join(Profile, Profile.id == Variant.profile_id)
        .where(*_forward(rollout_id), Deployment.phase.in_(SETTLED_PHASES), Deployment.fell_back != "")
        .group_by(Profile.name)
    )
    return {row[0]: row[1] for row in session.execute(query)}


def evidence_by_profile(session: Session, rollout_id: str) -> list[tuple[str, bytes]]:
    """What devices of a rollout say of its rules, with the names of their profiles."""
    query = (
        select(Profile.name, Deployment.evidence)
        .select_from(Deployment)
        .join(Variant, Variant.id == Deployment.variant_id)
        .join(Profile, Profile.id == Variant.profile_id)
        .where(*_forward(rollout_id), Deployment.sent_at.is_not(None), Deployment.evidence.is_not(None))
    )
    return [(row[0], row[1]) for row in session.execute(query) if row[1]]


def windows_to_judge(session: Session, rollout_id: str, *, limit: int) -> list[tuple[str, ModelWindowRow]]:
    """Windows of a rollout's deployments that no rule has seen, in the order they ended, with the deployments' ids."""
    query = (
        select(TelemetrySeries.deployment_id, ModelWindowRow)
        .join(ModelWindowRow, ModelWindowRow.series_id == TelemetrySeries.id)
        .join(Deployment, Deployment.id == TelemetrySeries.deployment_id)
        .where(*_forward(rollout_id), Deployment.sent_at.is_not(None), ~ModelWindowRow.judged)
        .order_by(ModelWindowRow.ended_at, ModelWindowRow.group_id, ModelWindowRow.number)
        .limit(limit)
    )
    return [(row[0], row[1]) for row in session.execute(query)]


def windows_of(
    session: Session, running: Mapping[str, str], since: dt.datetime
) -> Iterator[tuple[str, ModelWindowRow]]:
    """Windows of deployments that ended since a time, each with its deployment's id, in the order they ended.

    Args:
        session: to read with.
        running: the deployments, with their devices: what another device says of one is left out.
        since: when; those of thousands of devices are read a piece at a time, and need not be held together.
    """
    for piece in pieces(sorted(running), 50):
        query = (
            select(TelemetrySeries.deployment_id, TelemetrySeries.device_id, ModelWindowRow)
            .join(TelemetrySeries, TelemetrySeries.id == ModelWindowRow.series_id)
            .where(TelemetrySeries.deployment_id.in_(piece), ModelWindowRow.ended_at >= since)
            .order_by(ModelWindowRow.ended_at)
        )
        for deployment_id, device_id, window in session.execute(query):
            if running[deployment_id] == device_id:
                yield deployment_id, window


def mark_judged(session: Session, windows: Sequence[ModelWindowRow]) -> None:
    """Let no rule see these windows again."""
    if windows:
        judged = [{"group_id": one.group_id, "number": one.number, "judged": True} for one in windows]
        session.execute(update(ModelWindowRow), judged)


def deployments_of(session: Session, rollout_id: str, ids: Sequence[str]) -> list[Deployment]:
    """Those of these deployments that are a rollout's."""
    query = select(Deployment).where(Deployment.rollout_id == rollout_id)
    return list(scalars_by(session, query, Deployment.id, ids))


def controls(session: Session, rollout_id: str, profile_id: str, *, limit: int) -> list[tuple[str, str]]:
    """Devices of a profile that a rollout has not sent its version yet, and the deployment that each runs."""
    query = (
        select(Deployment.device_id, Deployment.previous_id)
        .join(Variant, Variant.id == Deployment.variant_id)
        .where(
            *_forward(rollout_id),
            Deployment.phase == SCHEDULED,
            Variant.profile_id == profile_id,
            Deployment.previous_id.is_not(None),
        )
        .order_by(Deployment.place.desc())
        .limit(limit)
    )
    return [(row[0], str(row[1])) for row in session.execute(query)]


def exposed(session: Session, rollout_id: str, since: dt.datetime, *, limit: int) -> Sequence[Deployment]:
    """Deployments that run beside the version before since then or longer, and are still told to."""
    query = select(Deployment).where(
        *_forward(rollout_id),
        Deployment.phase == "exposed",
        Deployment.exposed_at <= since,
        Deployment.exposure.is_not(None),
    )
    return session.scalars(query.order_by(Deployment.id).limit(limit)).all()


def cohort(session: Session, rollout_id: str, *, limit: int) -> list[tuple[Deployment, str]]:
    """Deployments that were sent, in their order, with the names of their profiles."""
    query = (
        select(Deployment, Profile.name)
        .join(Variant, Variant.id == Deployment.variant_id)
        .join(Profile, Profile.id == Variant.profile_id)
        .where(*_forward(rollout_id), Deployment.sent_at.is_not(None))
        .order_by(Deployment.stage, Deployment.place)
        .limit(limit)
    )
    return [(row[0], row[1]) for row in session.execute(query)]


def member_count(session: Session, rollout_id: str) -> int:
    """How many devices a rollout has."""
    return session.scalar(select(func.count()).select_from(Deployment).where(*_forward(rollout_id))) or 0


def outsiders(session: Session, rollout: Rollout, after: str, *, limit: int) -> Sequence[str]:
    """Devices of a rollout's fleet that are not in it and do not run its version, by id, after one."""
    inside = select(Deployment.id).where(Deployment.rollout_id == rollout.id, Deployment.device_id == Device.id)
    running = select(Deployment.id).where(
        Deployment.device_id == Device.id,
        Deployment.version_id == rollout.version_id,
        Deployment.desired.is_(True),
    )
    query = (
        select(Device.id)
        .where(
            Device.fleet_id == rollout.fleet_id,
            Device.id > after,
            Device.forgotten_at.is_(None),
            Device.profile_id.is_not(None),
            ~inside.exists(),
            ~running.exists(),
        )
        .order_by(Device.id)
        .limit(limit)
    )
    return session.scalars(query).all()


def unsettled_backs(session: Session, rollout_id: str) -> int:
    """How many deployments that take a rollout's devices back have not settled."""
    query = select(func.count()).select_from(Deployment)
    query = query.where(
        Deployment.rollout_id == rollout_id, Deployment.revert_of != "", Deployment.phase.not_in(SETTLED_PHASES)
    )
    return session.scalar(query) or 0


def unsettled(session: Session, model_id: str, device_ids: Sequence[str]) -> Sequence[Deployment]:
    """Deployments of a model on these devices that an open rollout has not settled."""
    query = (
        select(Deployment)
        .join(Rollout, Rollout.id == Deployment.rollout_id)
        .where(
            Deployment.model_id == model_id,
            Deployment.phase.not_in(SETTLED_PHASES),
            Rollout.state.in_(OPEN_STATES),
        )
    )
    return list(scalars_by(session, query, Deployment.device_id, device_ids))


def unsettled_of_device(session: Session, device_id: str) -> Sequence[Deployment]:
    """Deployments of a device that have not settled, of any model and rollout."""
    query = select(Deployment).where(Deployment.device_id == device_id, Deployment.phase.not_in(SETTLED_PHASES))
    return session.scalars(query).all()


def desired(session: Session, device_id: str, model_id: str | None = None) -> Sequence[Deployment]:
    """What a device ought to run: at most one deployment a model."""
    query = select(Deployment).where(Deployment.device_id == device_id, Deployment.desired.is_(True))
    if model_id is not None:
        query = query.where(Deployment.model_id == model_id)
    return session.scalars(query.order_by(Deployment.id)).all()


def desired_on(session: Session, device_ids: Sequence[str], model_id: str | None = None) -> dict[str, list[Deployment]]:
    """What devices ought to run, by device, as `desired`."""
    found: dict[str, list[Deployment]] = defaultdict(list)
    query = select(Deployment).where(Deployment.desired.is_(True)).order_by(Deployment.id)
    if model_id is not None:
        query = query.where(Deployment.model_id == model_id)
    for one in scalars_by(session, query, Deployment.device_id, device_ids):
        found[one.device_id].append(one)
    return found


def released(session: Session, device_ids: Collection[str]) -> dict[str, str]:
    """Of devices that ought to run no release of the agent: the last deployment of one that each was sent."""
    query = (
        select(Deployment.device_id, func.max(Deployment.id))
        .join(Model, Model.id == Deployment.model_id)
        .where(Model.kind == "agent", Deployment.sent_at.is_not(None))
        .group_by(Deployment.device_id)
    )
    return {row[0]: row[1] for row in rows_by(session, query, Deployment.device_id, sorted(device_ids))}


def by_id(session: Session, model: type[Row], ids: Collection[str]) -> dict[str, Row]:
    """Rows that are there, by their ids."""
    return {one.id: one for one in scalars_by(session, select(model), model.id, sorted(ids))}


def profiles_of(session: Session, version_id: str) -> dict[str, str]:
    """Ids of the profiles that a version has variants for, by name."""
    query = (
        select(Profile.name, Profile.id)
        .join(Variant, Variant.profile_id == Profile.id)
        .where(Variant.version_id == version_id)
        .order_by(Profile.name)
    )
    return {row[0]: row[1] for row in session.execute(query)}
