"""Every query over rollouts and deployments."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from fleet_server.models import Deployment, Device, Model, Profile, Rollout, Variant, Version
from fleet_server.paging import PageRequest, Rows, TableList
from fleet_server.rollouts.schemas import RolloutState

OPEN_STATES = (RolloutState.RUNNING.value, RolloutState.PAUSED.value, RolloutState.REVERTING.value)
SETTLED_PHASES = ("active", "failed", "rolled_back", "superseded")
DeploymentRow = tuple[Deployment, Variant, Version, Model, Profile]
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
    session: Session, fleet_id: str, request: PageRequest, *, state: str | None, model: str | None
) -> Rows[Rollout]:
    """A page of rollouts."""
    query = select(Rollout).where(Rollout.fleet_id == fleet_id)
    if state is not None:
        query = query.where(Rollout.state == state)
    if model is not None:
        query = query.join(Version, Version.id == Rollout.version_id).join(Model, Model.id == Version.model_id)
        query = query.where(Model.name == model)
    return ROLLOUTS.scalars(session, query, request)


def open_rollouts(session: Session) -> Sequence[str]:
    """Ids of rollouts the engine has something to do with."""
    states = (RolloutState.RUNNING.value, RolloutState.REVERTING.value)
    return session.scalars(select(Rollout.id).where(Rollout.state.in_(states)).order_by(Rollout.id)).all()


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


def phase_counts(session: Session, rollout_id: str) -> dict[str, int]:
    """How many of a rollout's forward deployments are in each phase."""
    query = (
        select(Deployment.phase, func.count())
        .where(Deployment.rollout_id == rollout_id, Deployment.revert_of == "")
        .group_by(Deployment.phase)
    )
    return {row[0]: row[1] for row in session.execute(query)}


def waiting_count(session: Session, rollout_id: str) -> int:
    """How many of a rollout's deployments stand still on purpose."""
    query = select(func.count()).where(
        Deployment.rollout_id == rollout_id,
        Deployment.revert_of == "",
        Deployment.phase.not_in(SETTLED_PHASES),
        Deployment.is_waiting.is_(True),
    )
    return session.scalar(query) or 0


def unsettled(session: Session, model_id: str, device_ids: Sequence[str]) -> Sequence[Deployment]:
    """Deployments of a model on these devices that an open rollout has not settled."""
    found: list[Deployment] = []
    for start in range(0, len(device_ids), 500):
        query = (
            select(Deployment)
            .join(Rollout, Rollout.id == Deployment.rollout_id)
            .where(
                Deployment.model_id == model_id,
                Deployment.device_id.in_(device_ids[start : start + 500]),
                Deployment.phase.not_in(SETTLED_PHASES),
                Rollout.state.in_(OPEN_STATES),
            )
        )
        found += session.scalars(query).all()
    return found


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


def clear_desired(session: Session, device_id: str, model_id: str) -> None:
    """Let no deployment of a model be desired on a device."""
    session.execute(
        update(Deployment)
        .where(Deployment.device_id == device_id, Deployment.model_id == model_id, Deployment.desired.is_(True))
        .values(desired=False)
    )


def deployments_by_id(session: Session, device_id: str, ids: Sequence[str]) -> Sequence[Deployment]:
    """Those of these deployments that are the device's."""
    return session.scalars(select(Deployment).where(Deployment.device_id == device_id, Deployment.id.in_(ids))).all()


def profiles_of(session: Session, version_id: str) -> dict[str, str]:
    """Ids of the profiles that a version has variants for, by name."""
    query = (
        select(Profile.name, Profile.id)
        .join(Variant, Variant.profile_id == Profile.id)
        .where(Variant.version_id == version_id)
        .order_by(Profile.name)
    )
    return {row[0]: row[1] for row in session.execute(query)}


def online(session: Session, device_ids: Sequence[str]) -> set[str]:
    """Which of these devices are connected."""
    found: set[str] = set()
    for start in range(0, len(device_ids), 500):
        part = device_ids[start : start + 500]
        found |= set(session.scalars(select(Device.id).where(Device.id.in_(part), Device.online.is_(True))))
    return found
