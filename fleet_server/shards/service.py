"""Rules of shard plans: cut, keep the stages as versions, say who has which."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from sqlalchemy.orm import Session

from converters.job import DataFile, Sharding, StageFile
from fleet_server import audit
from fleet_server.catalog import repository as catalog
from fleet_server.catalog import service as versions
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.schemas import SERVER, GateSpec, SourceFormat, SourceFormCreate, VersionCreate
from fleet_server.clock import utc_now
from fleet_server.conversions.sharder import CutOrder
from fleet_server.db import Database
from fleet_server.devices.schemas import ProfileSpec
from fleet_server.devices.service import chosen_devices
from fleet_server.domain.sharding import LINK_BYTES_S, Capacity, memory_of
from fleet_server.errors import InvalidError, NotFoundError
from fleet_server.models import Device, Model, Profile, ShardPlan, Variant, Version
from fleet_server.preconditions import Precondition
from fleet_server.principals import Who
from fleet_server.schemas import NAME_LENGTH
from fleet_server.shards import repository
from fleet_server.shards.schemas import PlanState, ProofView, ShardPlanCreate, ShardPlanView, StageView

MOST_DEVICES = 1000


class Sharder(Protocol):
    """Cuts a version into stages."""

    def cut(self, order: CutOrder, keep: KeepFile) -> Sharding:
        """Cut it; every file that was made is given to `keep`."""
        ...


class KeepFile(Protocol):
    """Takes a file that was made."""

    def __call__(self, path: Path, /) -> object:
        """Keep its bytes."""
        ...


def create(
    database: Database,
    store: ArtifactStore,
    inspector: versions.Inspector,
    sharder: Sharder,
    *,
    fleet_id: str,
    wanted: ShardPlanCreate,
    actor: Who,
) -> ShardPlanView:
    """Cut a version for devices; unless it is a dry run, its stages become versions and the keeper rolls them out.

    Raises:
        NotFoundError: for an unknown version.
        InvalidError: when the query selects no device that is online and has a profile for ONNX, or the version can't
            be cut for them.
    """
    with database.read() as session:
        version = versions.resolve_version(session, fleet_id, wanted.version)
        model = session.get_one(Model, version.model_id)
        capacities = candidates(session, fleet_id, version, wanted)
        order = _order(session, version, capacities, wanted)
        name = model.name
    kept: list[str] = []

    def keep(path: Path) -> None:
        if not wanted.dry_run:
            kept.append(versions.add_upload(database, store, fleet_id, path, actor=actor).digest)

    found = sharder.cut(order, keep)
    label = _label(version.name, found.stages)
    names = [stage_name(name, number, len(found.stages)) for number in range(len(found.stages))]
    limits = {one.device: one for one in capacities}
    stages = [_stage(one, limits[one.device], stage, label) for one, stage in zip(found.stages, names, strict=True)]
    proof = ProofView(difference=found.difference, exact=found.exact, quantized=found.quantized, whole_s=found.whole_s)
    if wanted.dry_run:
        now = utc_now()
        plan = ShardPlan(
            id=None, fleet_id=fleet_id, version_id=version.id, state=PlanState.PLANNED.value, detail="",
            order={}, stages=_plain(stages), proof=proof.model_dump(mode="json"), created_by=str(actor),
            created_at=now, updated_at=now,
        )  # fmt: skip
        return _view(plan, name, version.name)
    try:
        for one, stage in zip(found.stages, names, strict=True):
            versions.create_version(
                database,
                store,
                inspector,
                fleet_id=fleet_id,
                model_name=stage,
                wanted=_version(one, label),
                actor=actor,
            )
    except Exception:
        versions.discard_uploads(database, store, fleet_id, kept)
        raise
    with database.write() as session:
        plan = ShardPlan(
            fleet_id=fleet_id,
            version_id=version.id,
            state=PlanState.DEPLOYING.value,
            order=wanted.model_dump(mode="json"),
            stages=_plain(stages),
            proof=proof.model_dump(mode="json"),
            created_by=str(actor),
        )
        session.add(plan)
        session.flush()
        audit.record(
            session,
            fleet_id=fleet_id,
            actor=actor,
            action="shard_plan.create",
            subject=f"shard-plan/{plan.id}",
            detail=wanted.model_dump(mode="json") | {"devices": [one.device for one in stages]},
        )
        return plan_view(session, plan)


def candidates(session: Session, fleet_id: str, version: Version, wanted: ShardPlanCreate) -> list[Capacity]:
    """Devices of the target that may have a stage: online, with a profile that runs ONNX, and with no other stage.

    Raises:
        InvalidError: when there is none, or the query can't be read.
    """
    chosen = chosen_devices(session, fleet_id, (), wanted.target, most=MOST_DEVICES)
    taken = repository.held_devices(session, fleet_id)
    found = []
    profiles: dict[str, Profile] = {}
    for device in chosen:
        if device.profile_id is None or not device.online or device.hold is not None or device.id in taken:
            continue
        profile = profiles.setdefault(device.profile_id, session.get_one(Profile, device.profile_id))
        spec = ProfileSpec.model_validate(profile.spec)
        if spec.runtime == "onnx":
            found.append(_capacity(session, device, spec, version, wanted))
    if not found:
        raise InvalidError(
            "no_device",
            f"target: of {len(chosen)} devices none is online, has a profile with the runtime onnx and no stage of "
            "another plan; see `shoal device list`",
            field="target",
        )
    return found


def _capacity(
    session: Session, device: Device, spec: ProfileSpec, version: Version, wanted: ShardPlanCreate
) -> Capacity:
    facts = device.facts
    link = (facts.get("link") or {}).get("type", "unknown")
    return Capacity(
        device.id,
        memory_of(int(facts.get("memory_mb", 0)), spec.budgets.memory_mb, wanted.memory_mb),
        _speed(catalog.variant_of(session, version.id, str(device.profile_id))),
        LINK_BYTES_S.get(link, LINK_BYTES_S["unknown"]),
    )


def _speed(variant: Variant | None) -> float:
    """How fast devices of a profile are beside the server, by a gate run of this version; 1 where there was none."""
    if variant is None or variant.judged_against is None or not variant.gate or not variant.measurements:
        return 1.0
    plain = next((one for one in variant.candidates if one["precision"] == "fp32" and one.get("measurements")), None)
    if plain is None or variant.gate.get("measured_on") == SERVER or variant.precision != "fp32":
        return 1.0
    here = float(variant.judged_against["source"]["latency_p50_ms"])
    there = float(variant.measurements["latency_p50_ms"])
    return here / there if here > 0 and there > 0 else 1.0


def _order(session: Session, version: Version, capacities: Sequence[Capacity], wanted: ShardPlanCreate) -> CutOrder:
    forms = {one.format: one.digest for one in catalog.source_forms(session, version.id)}
    if SourceFormat.ONNX.value not in forms:
        detail = f"version: {wanted.version} has no ONNX form, and only that can be cut: push one"
        raise InvalidError("not_shardable", detail, field="version")
    return CutOrder(
        digest=forms[SourceFormat.ONNX.value],
        devices=capacities,
        stages=wanted.stages,
        rows=wanted.rows,
        calibration=version.calibration_digest,
        evaluation=version.evaluation_digest,
        processing=versions.processing_of(version),
    )


def stage_name(model: str, number: int, count: int) -> str:
    """The name of a stage's model.

    Raises:
        InvalidError: when it is too long.
    """
    name = f"{model}.stage-{number + 1}-of-{count}"
    if len(name) > NAME_LENGTH:
        detail = f"version: {name!r} is longer than {NAME_LENGTH} characters: push the model under a shorter name"
        raise InvalidError("name_too_long", detail, field="version")
    return name


def _label(version: str, stages: Sequence[StageFile]) -> str:
    """What the stages' versions are called: other cuts of a version are other versions, the same are the same."""
    digest = hashlib.sha256("".join(stage.digest for stage in stages).encode()).hexdigest()
    return f"{version[: NAME_LENGTH - 9]}-{digest[:8]}"


def _version(stage: StageFile, label: str) -> VersionCreate:
    return VersionCreate(
        name=label,
        sources=[SourceFormCreate(format=SourceFormat.ONNX, digest=stage.digest)],
        evaluation=_digest(stage.evaluation),
        calibration=_digest(stage.calibration),
        # An earlier cut of the model takes other tensors, so it is nothing to compare with.
        gate=GateSpec(max_regression_points=None),
    )


def _digest(file: DataFile | None) -> str | None:
    return None if file is None else file.digest


def _stage(stage: StageFile, capacity: Capacity, model: str, label: str) -> StageView:
    return StageView(
        model=model,
        version=label,
        device=stage.device,
        nodes=stage.nodes,
        compute_s=stage.compute_s,
        weight_bytes=stage.weight_bytes,
        activation_bytes=stage.activation_bytes,
        memory_limit=int(capacity.memory),
        bytes_in=stage.bytes_in,
        bytes_out=stage.bytes_out,
        transfer_s=stage.transfer_s,
        speed=capacity.speed,
    )


def _plain(stages: Sequence[StageView]) -> list[dict[str, object]]:
    return [one.model_dump(mode="json") for one in stages]


def get_plan(session: Session, fleet_id: str, plan_id: str) -> ShardPlan:
    """One plan.

    Raises:
        NotFoundError: when it is not there.
    """
    plan = repository.plan(session, fleet_id, plan_id)
    if plan is None:
        raise NotFoundError("shard_plan", plan_id, remedy="list them with `shoal model shards`")
    return plan


def delete(session: Session, fleet_id: str, plan_id: str, *, actor: Who, unchanged: Precondition) -> None:
    """Forget a plan: nobody looks after it; the stages stay on their devices as any model does.

    Raises:
        NotFoundError: when it is not there.
    """
    plan = get_plan(session, fleet_id, plan_id)
    unchanged.check(session, plan, lambda: plan_view(session, plan))
    session.delete(plan)
    audit.record(session, fleet_id=fleet_id, actor=actor, action="shard_plan.delete", subject=f"shard-plan/{plan_id}")


def plan_view(session: Session, plan: ShardPlan) -> ShardPlanView:
    """The HTTP shape of a plan."""
    version = session.get_one(Version, plan.version_id)
    return _view(plan, session.get_one(Model, version.model_id).name, version.name)


def _view(plan: ShardPlan, model: str, version: str) -> ShardPlanView:
    stages = [StageView.model_validate(one) for one in plan.stages]
    return ShardPlanView(
        id=plan.id,
        model=model,
        version=version,
        state=PlanState(plan.state),
        detail=plan.detail,
        stages=stages,
        slowest_s=max(one.compute_s + one.transfer_s for one in stages),
        proof=ProofView.model_validate(plan.proof),
        created_by=plan.created_by,
        created_at=plan.created_at,
        updated_at=plan.updated_at,
    )
