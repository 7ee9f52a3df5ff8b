"""Brings a plan's stages to their devices, and to others when those are lost. Works in its caller's transaction."""

from __future__ import annotations

import datetime as dt

from sqlalchemy.orm import Session

from agent.protocol.lifecycle import Phase
from fleet_server.catalog import repository as catalog
from fleet_server.catalog.schemas import VariantBuild, VariantState
from fleet_server.catalog.service import resolve_version
from fleet_server.conversions.service import request_builds
from fleet_server.db import savepoint
from fleet_server.domain.sharding import Need, taken_over
from fleet_server.domain.states import RolloutState
from fleet_server.domain.strategy import RolloutStrategy, RolloutTarget
from fleet_server.domain.strategy import Stage as RolloutStage
from fleet_server.errors import ConflictError, FleetError, InvalidError
from fleet_server.models import Device, Profile, ShardPlan, Version
from fleet_server.rollouts import service as rollouts
from fleet_server.rollouts.schemas import RolloutCreate
from fleet_server.settings import Settings
from fleet_server.shards import repository
from fleet_server.shards.schemas import PlanState, ShardPlanCreate, StageView
from fleet_server.shards.service import candidates

SERVES = frozenset({Phase.PROBATION.value, Phase.ACTIVE.value})
ENDED = frozenset({RolloutState.STOPPED.value, RolloutState.REVERTED.value})
FAILED = frozenset({Phase.FAILED.value, Phase.ROLLED_BACK.value})
_HOPELESS = {
    VariantState.FAILED.value: "could not be built",
    VariantState.REFUSED.value: "was refused by the gate",
    VariantState.CANCELLED.value: "is not built, because somebody cancelled that",
}


class _StageError(Exception):
    """A stage can't be brought to its device; the message says why."""


def step(session: Session, settings: Settings, plan: ShardPlan, now: dt.datetime) -> None:
    """Do the next of what a plan needs."""
    stages = [StageView.model_validate(one) for one in plan.stages]
    order = ShardPlanCreate.model_validate(plan.order)
    devices = repository.devices(session, [one.device for one in stages])
    said: list[str] = []
    try:
        stages = _without_lost(session, plan, stages, order, devices, now)
        devices = repository.devices(session, [one.device for one in stages])
        stages = [_brought(session, settings, plan, one, devices[one.device], said) for one in stages]
    except _StageError as error:
        plan.state, plan.detail = PlanState.FAILED.value, str(error)
        return
    _keep(plan, stages)
    serve = all(one.serves for one in stages)
    state, detail = (PlanState.ACTIVE if serve else PlanState.DEPLOYING).value, "; ".join(said)[:2000]
    if (plan.state, plan.detail) != (state, detail):
        plan.state, plan.detail = state, detail


def _keep(plan: ShardPlan, stages: list[StageView]) -> None:
    plain = [one.model_dump(mode="json") for one in stages]
    if plain != plan.stages:
        plan.stages = plain


def _without_lost(
    session: Session,
    plan: ShardPlan,
    stages: list[StageView],
    order: ShardPlanCreate,
    devices: dict[str, Device],
    now: dt.datetime,
) -> list[StageView]:
    """The stages, those of devices that are lost on others."""
    lost = [one for one in stages if _is_lost(devices.get(one.device), order, now)]
    if not lost:
        return stages
    names = ", ".join(sorted(one.device for one in lost))
    version = session.get_one(Version, plan.version_id)
    try:
        spares = candidates(session, plan.fleet_id, version, order)
    except InvalidError:
        spares = []
    needs = [
        Need(one.weight_bytes + one.activation_bytes, one.compute_s * one.speed, one.bytes_in + one.bytes_out)
        for one in lost
    ]
    chosen = taken_over(needs, spares)
    if chosen is None:
        raise _StageError(
            f"{names} offline for more than {order.lost_after_s:g} s, and of {len(spares)} spare devices none can hold "
            "the stage: start it again or free another, then cut anew"
        )
    by_id = {one.device: one for one in spares}
    moved = {}
    for one, need, device in zip(lost, needs, chosen, strict=True):
        spare = by_id[device]
        moved[one.model] = one.model_copy(
            update={
                "device": device, "rollout": None, "serves": False, "speed": spare.speed,
                "memory_limit": int(spare.memory), "compute_s": need.row_s / spare.speed,
                "transfer_s": need.row_bytes / spare.bytes_per_s,
            }
        )  # fmt: skip
    return [moved.get(one.model, one) for one in stages]


def _is_lost(device: Device | None, order: ShardPlanCreate, now: dt.datetime) -> bool:
    if device is None:
        return True
    if device.online or device.last_seen_at is None:
        return False
    return now - device.last_seen_at > dt.timedelta(seconds=order.lost_after_s)


def _brought(
    session: Session, settings: Settings, plan: ShardPlan, stage: StageView, device: Device, said: list[str]
) -> StageView:
    """A stage after the next step towards its device; what it waits for is added to `said`."""
    reference = f"{stage.model}@{stage.version}"
    if stage.rollout is None:
        stage = _rolled_out(session, settings, plan, stage, device, said)
        if stage.rollout is None:
            return stage
    deployment = repository.deployment(session, stage.rollout, device.id)
    phase = deployment.phase if deployment is not None else "waiting for its rollout to begin"
    if phase in FAILED:
        raise _StageError(f"{device.id} did not take {reference} ({phase}): see `shoal rollout show {stage.rollout}`")
    serves = phase in SERVES
    if not serves and repository.rollout_state(session, stage.rollout) in ENDED:
        raise _StageError(f"rollout {stage.rollout} of {reference} was ended: cut anew when it may go there")
    if not serves:
        said.append(f"{reference} on {device.id} is {phase}")
    return stage.model_copy(update={"serves": serves}) if serves != stage.serves else stage


def _rolled_out(
    session: Session, settings: Settings, plan: ShardPlan, stage: StageView, device: Device, said: list[str]
) -> StageView:
    """A stage with the rollout that brings it to its device, once there is one; before that it is built."""
    actor = f"shard-plan/{plan.id}"
    reference = f"{stage.model}@{stage.version}"
    if device.profile_id is None:
        raise _StageError(f"no profile matches {device.id} any more: create one, then cut anew")
    version = resolve_version(session, plan.fleet_id, reference)
    variant = catalog.variant_of(session, version.id, device.profile_id)
    if variant is None:
        profile = session.get_one(Profile, device.profile_id).name
        wanted = VariantBuild(version=reference, profiles=[profile])
        request_builds(session, plan.fleet_id, wanted, actor=actor)
        said.append(f"{reference} is built for {profile}")
        return stage
    if variant.state in _HOPELESS:
        profile = session.get_one(Profile, device.profile_id).name
        why = f" ({variant.failure['detail']})" if variant.failure else ""
        raise _StageError(f"{reference} for {profile} {_HOPELESS[variant.state]}{why}: see `shoal variant list`")
    if variant.state != VariantState.READY.value:
        said.append(f"{reference} is {variant.state}")
        return stage
    try:
        with savepoint(session):
            rollout = rollouts.create(session, settings, plan.fleet_id, _rollout(reference, device.id), actor=actor)
    except ConflictError as error:
        said.append(f"{reference}: {error.detail}")
        return stage
    except FleetError as error:
        raise _StageError(f"{reference} can't be rolled out: {error.detail}") from None
    return stage.model_copy(update={"rollout": rollout.id})


def _rollout(reference: str, device: str) -> RolloutCreate:
    """All at once: a stage serves nobody until the others are there too. Its own gate compared it with the source."""
    return RolloutCreate(
        version=reference,
        name=f"stage {reference}"[:128],
        target=RolloutTarget(devices=[device], late=False),
        strategy=RolloutStrategy(stages=[RolloutStage(percent=100)]),
        allow_unproven=True,
        on_busy="supersede",
    )
