"""Rules of rollouts and deployments. Each function works in its caller's transaction."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.codec import encode
from agent.protocol.delivery import DeliveryPolicy
from agent.protocol.lifecycle import SETTLED, TRANSITIONS, Phase
from agent.protocol.manifest import DataFile, Encoding, Manifest, manifest_bytes
from agent.protocol.messages import (
    DeploymentReport,
    DesiredDeployment,
    DesiredState,
    ProbationPolicy,
    Reported,
    Trial,
)
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.version import SPOKEN
from fleet_server import audit, outbox
from fleet_server.catalog.service import is_proven, ready_variant, resolve_version
from fleet_server.conversions.repository import open_trials
from fleet_server.db import utc_now
from fleet_server.deltas import service as deltas
from fleet_server.devices import service as device_service
from fleet_server.devices.delivery import Delivery, combined, policy_of, without_windows
from fleet_server.devices.schemas import ProfileSpec, ProfileUpdate
from fleet_server.errors import ConflictError, InvalidError, NotFoundError
from fleet_server.models import Deployment, Device, Fleet, Model, Profile, Rollout, Variant, Version
from fleet_server.principals import Who, id_of
from fleet_server.rollouts import announcements, repository
from fleet_server.rollouts.policy import RolloutTransitionError, assign_stages, check_transition
from fleet_server.rollouts.schemas import (
    Approval,
    DeploymentView,
    ProbationView,
    RolloutCounts,
    RolloutCreate,
    RolloutState,
    RolloutStrategy,
    RolloutTarget,
    RolloutView,
    StageVerdict,
    Terms,
)
from fleet_server.schemas import Failure, Waiting
from fleet_server.settings import Settings
from fleet_server.trust import service as trust

SCHEDULED = "scheduled"
GONE_BACK = (Phase.FAILED.value, Phase.ROLLED_BACK.value)
_NAMED = 20


def create(session: Session, settings: Settings, fleet_id: str, wanted: RolloutCreate, *, actor: Who) -> Rollout:
    """Start a rollout, or let it wait where its fleet asks for approvals.

    Raises:
        NotFoundError: for an unknown version, device or profile.
        InvalidError: when the target selects no device.
        ConflictError: when a device has no profile or its profile no ready variant, or is busy with another rollout,
            or when a variant is not signed.
    """
    version = resolve_version(session, fleet_id, wanted.version)
    plan = _plan(session, settings, version, wanted)
    needed = session.get_one(Fleet, fleet_id).approvals
    terms = Terms(on_busy=wanted.on_busy, allow_unproven=wanted.allow_unproven, artifacts=plan.artifacts)
    rollout = Rollout(
        fleet_id=fleet_id,
        name=wanted.name or wanted.version,
        version_id=version.id,
        state=(RolloutState.AWAITING_APPROVAL if needed else RolloutState.RUNNING).value,
        target=wanted.target.model_dump(mode="json"),
        strategy=wanted.strategy.model_dump(mode="json"),
        delivery=wanted.delivery.model_dump(mode="json") if wanted.delivery else None,
        terms=terms.model_dump(mode="json"),
        created_by=str(actor),
        creator_id=id_of(actor),
        approvals_needed=needed,
        approvals=[],
        stage=0,
        verdicts=[],
    )
    session.add(rollout)
    session.flush()
    announcements.rollout_decided(rollout, "create", f"by {actor}")
    audit.record(
        session,
        fleet_id=fleet_id,
        actor=actor,
        action="rollout.create",
        subject=f"rollout/{rollout.id}",
        detail=wanted.model_dump(mode="json"),
    )
    if needed:
        add_verdict(rollout, "wait", f"{needed} others must approve it: `shoal rollout approve {rollout.id}`")
    else:
        _begin(session, settings, rollout, version, wanted, plan)
    return rollout


def begin_approved(session: Session, settings: Settings, rollout: Rollout) -> None:
    """Start a rollout that waited, with what it was created for.

    Raises:
        ConflictError: as `create`, or when other artifacts would be sent than those that were approved.
    """
    version = session.get_one(Version, rollout.version_id)
    terms = Terms.model_validate(rollout.terms)
    wanted = RolloutCreate(
        version=f"{session.get_one(Model, version.model_id).name}@{version.name}",
        target=RolloutTarget.model_validate(rollout.target),
        strategy=RolloutStrategy.model_validate(rollout.strategy),
        allow_unproven=terms.allow_unproven,
        on_busy=terms.on_busy,
    )
    plan = _plan(session, settings, version, wanted)
    others = sorted(name for name, digest in plan.artifacts.items() if terms.artifacts.get(name) != digest)
    if others:
        raise ConflictError(
            "artifact_changed",
            f"since it was created the variant for {_list(others)} is another: that one was not approved; abort this "
            "rollout and create it again",
        )
    _begin(session, settings, rollout, version, wanted, plan)


@dataclass(frozen=True)
class _Plan:
    """The devices of a rollout, and by profile id what they get."""

    devices: list[Device]
    variants: dict[str, Variant]
    names: dict[str, str]

    @property
    def artifacts(self) -> dict[str, str | None]:
        """Digests by profile name."""
        return {self.names[profile_id]: variant.digest for profile_id, variant in self.variants.items()}


def _plan(session: Session, settings: Settings, version: Version, wanted: RolloutCreate) -> _Plan:
    target = wanted.target
    devices = device_service.select_devices(
        session,
        version.fleet_id,
        all_of_them=target.all,
        devices=target.devices,
        profiles=target.profiles,
        tags=target.tags,
        query=target.query,
    )
    if not devices:
        raise InvalidError(
            "no_device", "target: it selects no device; see which there are with `shoal device list`", field="target"
        )
    variants = _variants(session, version, devices, wanted)
    paths = [trust.want(session, version.fleet_id, _manifest(variant)) for variant in variants.values()]
    trust.require_signed(session, settings, version.fleet_id, paths, wanted.version)
    names = {profile_id: session.get_one(Profile, profile_id).name for profile_id in variants}
    return _Plan(devices, variants, names)


def _begin(
    session: Session, settings: Settings, rollout: Rollout, version: Version, wanted: RolloutCreate, plan: _Plan
) -> None:
    devices = plan.devices
    superseded = _settle_busy(session, version, devices, supersede=wanted.on_busy == "supersede")
    stages = assign_stages([(device.id, plan.names[str(device.profile_id)]) for device in devices], wanted.strategy)
    rollout.stage_started_at = utc_now()
    for device in devices:
        _add_deployment(session, rollout, device, version, plan.variants[str(device.profile_id)], stages[device.id])
    session.flush()
    add_verdict(rollout, "start", f"{len(devices)} devices in {len(wanted.strategy.stages)} stages")
    send_stage(session, settings, rollout)
    for deployment in superseded:
        # Not in the first stage: until its own stage comes the device goes back, or it would finish what was ended.
        if deployment.desired and not deployment.revert_of:
            _take_back(session, settings, deployment)


def _variants(
    session: Session, version: Version, devices: Sequence[Device], wanted: RolloutCreate
) -> dict[str, Variant]:
    reference = wanted.version
    strangers = [device.id for device in devices if device.profile_id is None]
    if strangers:
        raise ConflictError(
            "device_without_profile",
            f"no profile matches {_list(strangers)}: create one, pin the devices, or leave them out",
        )
    found, missing = {}, []
    for profile_id in sorted({str(device.profile_id) for device in devices}):
        variant = ready_variant(session, version.id, profile_id)
        if variant is None:
            missing.append(session.get_one(Profile, profile_id).name)
        else:
            found[profile_id] = variant
    if missing:
        raise ConflictError(
            "no_variant_for_profile",
            f"{reference} has no variant that passed the gate for {_list(sorted(missing))}: "
            f"see `shoal variant list --version {reference}`, and build it with `shoal variant build`",
        )
    unproven = [
        session.get_one(Profile, profile_id).name
        for profile_id, variant in found.items()
        if not wanted.allow_unproven and not is_proven(variant)
    ]
    if unproven:
        raise ConflictError(
            "variant_unproven",
            f"{reference} was measured on the server only for {_list(sorted(unproven))}: measure it on a device with "
            f"`shoal gate run {reference} --profile {min(unproven)}`, or allow it (--allow-unproven)",
        )
    return found


def _settle_busy(
    session: Session, version: Version, devices: Sequence[Device], *, supersede: bool
) -> Sequence[Deployment]:
    """End what other open rollouts have not settled on these devices, or refuse; returns what was ended."""
    busy = repository.unsettled(session, version.model_id, [device.id for device in devices])
    if busy and not supersede:
        ids = sorted({deployment.device_id for deployment in busy})
        rollouts = sorted({deployment.rollout_id for deployment in busy})
        raise ConflictError(
            "device_busy",
            f"{_list(ids)} still in rollout {_list(rollouts)}: wait, abort it, or supersede it (on_busy=supersede)",
        )
    for deployment in busy:
        deployment.phase, deployment.settled_at = Phase.SUPERSEDED.value, utc_now()
        deployment.failure = {"code": "superseded", "detail": "a newer rollout of the model took the device over"}
    session.flush()
    return busy


def _add_deployment(
    session: Session, rollout: Rollout, device: Device, version: Version, variant: Variant, stage: int
) -> None:
    current = repository.desired(session, device.id, version.model_id)
    session.add(
        Deployment(
            fleet_id=rollout.fleet_id,
            rollout_id=rollout.id,
            device_id=device.id,
            model_id=version.model_id,
            version_id=version.id,
            variant_id=variant.id,
            previous_id=_working(session, current[0]) if current else None,
            stage=stage,
        )
    )


def _working(session: Session, deployment: Deployment) -> str | None:
    """The deployment a device would go back to: the newest before that served, or that takes it back to one."""
    seen: Deployment | None = deployment
    while seen is not None and seen.phase != Phase.ACTIVE.value and not seen.revert_of:
        seen = session.get(Deployment, seen.previous_id) if seen.previous_id else None
    return seen.id if seen else None


def send_stage(session: Session, settings: Settings, rollout: Rollout) -> bool:
    """Make the deployments of the present stage what their devices ought to run.

    Those for whose devices a difference is being made wait for it, for a while: what is small then is worth it.

    Returns:
        Whether all of them were sent.
    """
    due = [
        one
        for one in repository.deployments(session, rollout.id)
        if one.phase == SCHEDULED and one.stage <= rollout.stage and not one.revert_of
    ]
    waited = utc_now() - (rollout.stage_started_at or utc_now()) >= dt.timedelta(seconds=settings.delta_wait_s)
    held_back = deltas.awaiting(session, settings, rollout.id, rollout.stage) if due and not waited else set()
    for deployment in due:
        if deployment.id not in held_back:
            _desire(session, settings, deployment)
    return not held_back


def _desire(session: Session, settings: Settings, deployment: Deployment) -> None:
    repository.clear_desired(session, deployment.device_id, deployment.model_id)
    deployment.desired, deployment.phase, deployment.sent_at = True, Phase.PENDING.value, utc_now()
    session.flush()
    queue_desired(session, settings, session.get_one(Device, deployment.device_id))


def queue_desired(session: Session, settings: Settings, device: Device, *, resend: bool = False) -> None:
    """Write the device's desired state to the outbox: with a new revision, or as it is when only sent again."""
    if not resend:
        device.desired_revision += 1
    profile = session.get(Profile, device.profile_id) if device.profile_id else None
    general = policy_of(profile.delivery if profile else None)
    state = DesiredState(
        protocol=SPOKEN,
        fleet=device.fleet_id,
        revision=device.desired_revision,
        deployments=tuple(
            DesiredDeployment(
                deployment_id=deployment.id,
                manifest=signed_manifest(session, deployment),
                probation_s=(policy := _policy(session, settings, deployment)).seconds,
                probation=policy,
                encodings=_encodings(session, deployment),
                delivery=_delivery(session, deployment, general),
            )
            for deployment in repository.desired(session, device.id)
        ),
        telemetry_interval_s=settings.telemetry_interval_s,
        trials=tuple(
            Trial(
                trial.id,
                tuple(
                    _signed(session, device.fleet_id, one, one.trial_path)
                    for one in msgspec.convert(run.candidates, list[Manifest])
                ),
                msgspec.convert(run.data, DataFile),
                settings.gate_candidate_timeout_s,
                without_windows(general),  # a run has a deadline
            )
            for trial, run in open_trials(session, device.id)
        ),
    )
    outbox.enqueue(
        session,
        fleet_id=device.fleet_id,
        topic=device_topic(device.id, DeviceTopic.DESIRED),
        payload=encode(state),
        retain=True,
    )


def _policy(session: Session, settings: Settings, deployment: Deployment) -> ProbationPolicy:
    """How a device is to watch what it is sent; a memory budget holds for it where the rollout names no other.

    What takes a device back has proved itself, and may be slower than what it takes back: only a crash undoes that.
    """
    spec = RolloutStrategy.model_validate(session.get_one(Rollout, deployment.rollout_id).strategy).probation
    variant = session.get_one(Variant, deployment.variant_id)
    budget = ProfileSpec.model_validate(variant.profile_spec).budgets.memory_mb
    measured = (variant.measurements or {}).get("memory_mb")
    if deployment.revert_of:
        return ProbationPolicy(
            seconds=settings.probation_s,
            error_share=1.0,
            latency_ratio=0.0,
            growth_mb=0.0,
            load_mb=measured,
            replace_when_short=spec.on_memory_short == "replace",
        )
    return ProbationPolicy(
        seconds=settings.probation_s if spec.seconds is None else spec.seconds,
        minimum_requests=spec.minimum_requests,
        at_most_s=spec.at_most_s or 0.0,
        error_share=spec.error_percent / 100,
        latency_ratio=spec.latency_p95_ratio,
        memory_mb=spec.memory_mb or (budget + spec.growth_mb if budget is not None else None),
        growth_mb=spec.growth_mb,
        load_mb=measured,
        replace_when_short=spec.on_memory_short == "replace",
    )


def _encodings(session: Session, deployment: Deployment) -> tuple[Encoding, ...]:
    """How what a deployment runs may travel; of what is there already, nothing need be said."""
    if Phase(deployment.phase) in SETTLED:
        return ()
    digest = manifest_of(session, deployment).digest
    return deltas.offered(session, deployment.fleet_id, digest, deployment.device_id)


def _delivery(session: Session, deployment: Deployment, general: DeliveryPolicy) -> DeliveryPolicy:
    policy = combined(general, policy_of(session.get_one(Rollout, deployment.rollout_id).delivery))
    return without_windows(policy) if deployment.revert_of else policy


def change_profile(
    session: Session, settings: Settings, fleet_id: str, name: str, change: ProfileUpdate, *, actor: Who
) -> Profile:
    """Change a profile's delivery policy, and tell its devices.

    Raises:
        NotFoundError: when there is no such profile.
    """
    profile, devices = device_service.change_delivery(session, fleet_id, name, change.delivery, actor=actor)
    for device in devices:
        queue_desired(session, settings, device)
    return profile


def manifest_of(session: Session, deployment: Deployment) -> Manifest:
    """What a deployment runs."""
    return _manifest(session.get_one(Variant, deployment.variant_id))


def _manifest(variant: Variant) -> Manifest:
    return msgspec.convert(variant.manifest, Manifest)


def signed_manifest(session: Session, deployment: Deployment) -> msgspec.Raw:
    """The bytes that were signed of what a deployment runs."""
    manifest = manifest_of(session, deployment)
    return _signed(session, deployment.fleet_id, manifest, manifest.target_path)


def _signed(session: Session, fleet_id: str, manifest: Manifest, path: str) -> msgspec.Raw:
    """A manifest as it was signed; one that never was is sent all the same: the device refuses it, and says so."""
    return msgspec.Raw(trust.manifest_as_signed(session, fleet_id, path) or manifest_bytes(manifest))


def apply_report(session: Session, settings: Settings, device: Device, reported: Reported, now: dt.datetime) -> None:
    """Bring the device's deployments to where the device says they are."""
    reports = {report.deployment_id: report for report in reported.deployments}
    serving = {one.deployment_id for one in reported.serving}
    for deployment in repository.deployments_by_id(session, device.id, list(reports)):
        _apply(deployment, reports[deployment.id], now, serves=deployment.id in serving)
        if deployment.desired and deployment.phase in GONE_BACK:
            _follow_back(session, settings, device, deployment, reports)


def _follow_back(
    session: Session,
    settings: Settings,
    device: Device,
    deployment: Deployment,
    reports: Mapping[str, DeploymentReport],
) -> None:
    """What a device took back, it ought not to run: what it went back to is what it is told from now on.

    Else a device that loses its journal would try the bad version again, with nothing to go back to. A version before
    that the device no longer holds, because this one had already taken its place, is sent again.
    """
    before = session.get(Deployment, deployment.previous_id) if deployment.previous_id else None
    report = reports.get(before.id) if before is not None else None
    if before is None or report is None or report.phase is not Phase.ACTIVE:
        _take_back(session, settings, deployment)
        return
    deployment.desired = False
    session.flush()
    before.desired = True
    session.flush()
    queue_desired(session, settings, device)


def _apply(deployment: Deployment, report: DeploymentReport, now: dt.datetime, *, serves: bool) -> None:
    current = None if deployment.phase == SCHEDULED else Phase(deployment.phase)
    if current is None or not _reaches(current, report.phase):
        return
    deployment.phase = report.phase.value
    deployment.received_bytes = max(deployment.received_bytes, report.received_bytes)
    deployment.encoding = report.encoding or deployment.encoding
    deployment.missing_chunks, deployment.attempts = report.missing_chunks, report.attempts
    if report.probation is not None:
        deployment.probation = msgspec.to_builtins(report.probation)
    deployment.sources = report.sources
    deployment.waiting = msgspec.to_builtins(report.waiting) if report.waiting else None
    deployment.is_waiting = report.waiting is not None
    if report.failure is not None:
        deployment.failure = {"code": report.failure.code.value, "detail": report.failure.detail[:2000]}
    if serves and deployment.serving_at is None:
        deployment.serving_at = now
    if report.phase in SETTLED and current not in SETTLED:
        deployment.settled_at = now
    announcements.deployment_moved(deployment, current.value)


def _reaches(current: Phase, wanted: Phase) -> bool:
    """Whether the table leads from one phase to the other, over phases whose reports were coalesced."""
    seen, frontier = {current}, [current]
    while frontier:
        for following in TRANSITIONS[frontier.pop()]:
            if following not in seen:
                seen.add(following)
                frontier.append(following)
    return wanted in seen


def pause(session: Session, rollout: Rollout, reason: str, *, actor: Who) -> None:
    """Send no further stage; what was sent goes on."""
    move(session, rollout, RolloutState.PAUSED, "pause", reason, actor=actor)


def resume(session: Session, settings: Settings, rollout: Rollout, *, actor: Who) -> None:
    """Go on with a paused rollout; one that waits for approvals goes on by those alone.

    Raises:
        ConflictError: when it is not paused.
    """
    if rollout.state == RolloutState.AWAITING_APPROVAL.value:
        raise ConflictError("awaiting_approval", f"it waits for approvals: `shoal rollout approve {rollout.id}`")
    move(session, rollout, RolloutState.RUNNING, "resume", "asked to go on", actor=actor)
    send_stage(session, settings, rollout)


def abort(session: Session, settings: Settings, rollout: Rollout, *, revert: bool, actor: Who) -> None:
    """End a rollout; with `revert` take its devices back to what they ran before."""
    if revert:
        start_revert(session, settings, rollout, "aborted with revert", actor=actor)
        return
    _drop_scheduled(session, rollout, "the rollout was aborted")
    move(session, rollout, RolloutState.STOPPED, "abort", "devices that have the version keep it", actor=actor)


def start_revert(session: Session, settings: Settings, rollout: Rollout, reason: str, *, actor: Who) -> None:
    """Take every device that was sent the version back to what it ran before, or take the model off it."""
    move(session, rollout, RolloutState.REVERTING, "revert", reason, actor=actor)
    _drop_scheduled(session, rollout, "the rollout was reverted")
    for deployment in repository.deployments(session, rollout.id):
        if not deployment.desired or deployment.revert_of:
            continue
        _take_back(session, settings, deployment)


def _take_back(session: Session, settings: Settings, deployment: Deployment) -> None:
    """Send a device to what it ran before a deployment; where there was nothing, take the model off it."""
    previous = session.get(Deployment, deployment.previous_id) if deployment.previous_id else None
    if previous is None:
        deployment.desired = False
        session.flush()
        queue_desired(session, settings, session.get_one(Device, deployment.device_id))
        return
    back = Deployment(
        fleet_id=deployment.fleet_id,
        rollout_id=deployment.rollout_id,
        device_id=deployment.device_id,
        model_id=deployment.model_id,
        version_id=previous.version_id,
        variant_id=previous.variant_id,
        previous_id=previous.previous_id,
        revert_of=deployment.id,
        stage=deployment.stage,
    )
    session.add(back)
    session.flush()
    _desire(session, settings, back)


def forget_device(session: Session, settings: Settings, fleet_id: str, device_id: str, *, actor: Who) -> None:
    """Forget a device and end its part in every rollout, so that none waits for it.

    Raises:
        NotFoundError: when the fleet has none of that id.
        ConflictError: when it is online.
    """
    device_service.forget_device(session, fleet_id, device_id, actor=actor)
    for deployment in repository.unsettled_of_device(session, device_id):
        deployment.phase, deployment.settled_at = Phase.SUPERSEDED.value, utc_now()
        deployment.failure = {"code": "device_forgotten", "detail": "the device was forgotten"}
    for deployment in repository.desired(session, device_id):
        deployment.desired = False
    session.flush()
    queue_desired(session, settings, session.get_one(Device, device_id))


def _drop_scheduled(session: Session, rollout: Rollout, detail: str) -> None:
    for deployment in repository.deployments(session, rollout.id):
        if deployment.phase == SCHEDULED:
            deployment.phase, deployment.settled_at = Phase.SUPERSEDED.value, utc_now()
            deployment.failure = {"code": "superseded", "detail": detail}
    session.flush()


def finish(session: Session, rollout: Rollout, state: RolloutState, decision: str, reason: str) -> None:
    """End a rollout."""
    move(session, rollout, state, decision, reason, actor="server")


def move(session: Session, rollout: Rollout, state: RolloutState, decision: str, reason: str, *, actor: Who) -> None:
    """Bring a rollout to another state, with its verdict and its audit event.

    Raises:
        ConflictError: where the table of states does not lead there.
    """
    before = {"state": rollout.state}
    try:
        rollout.state = check_transition(RolloutState(rollout.state), state).value
    except RolloutTransitionError as error:
        raise ConflictError("bad_transition", f"{error}: see `shoal rollout show {rollout.id}`") from None
    if state in {RolloutState.SUCCEEDED, RolloutState.STOPPED, RolloutState.REVERTED}:
        rollout.finished_at = utc_now()
    add_verdict(rollout, decision, reason)
    audit.record(
        session,
        fleet_id=rollout.fleet_id,
        actor=actor,
        action=f"rollout.{decision}",
        subject=f"rollout/{rollout.id}",
        detail={"reason": reason},
        before=before,
        after={"state": rollout.state},
    )


def add_verdict(rollout: Rollout, decision: str, reason: str) -> None:
    """Append a judgement; a new list, so that the ORM sees the change."""
    verdict = StageVerdict(at=utc_now(), stage=rollout.stage, decision=decision, reason=reason)
    rollout.verdicts = [*rollout.verdicts, verdict.model_dump(mode="json")]
    announcements.rollout_decided(rollout, decision, reason)


def get_rollout(session: Session, fleet_id: str, rollout_id: str, *, lock: bool = False) -> Rollout:
    """One rollout; with `lock`, nobody else changes it until this transaction ends.

    Raises:
        NotFoundError: when it is not there.
    """
    rollout = repository.rollout(session, fleet_id, rollout_id, lock=lock)
    if rollout is None:
        raise NotFoundError("rollout", rollout_id, remedy="list them with `shoal rollout list`")
    return rollout


def rollout_view(session: Session, rollout: Rollout) -> RolloutView:
    """The HTTP shape of a rollout."""
    version = session.get_one(Version, rollout.version_id)
    strategy = RolloutStrategy.model_validate(rollout.strategy)
    phases = repository.phase_counts(session, rollout.id)
    ended = sum(phases.get(phase, 0) for phase in ("failed", "rolled_back"))
    counts = RolloutCounts(
        total=sum(phases.values()),
        scheduled=phases.get(SCHEDULED, 0),
        active=phases.get("active", 0),
        failed=ended,
        superseded=phases.get("superseded", 0),
        waiting=repository.waiting_count(session, rollout.id),
        in_progress=sum(phases.values())
        - ended
        - sum(phases.get(phase, 0) for phase in (SCHEDULED, "active", "superseded")),
    )
    return RolloutView(
        id=rollout.id,
        name=rollout.name,
        model=session.get_one(Model, version.model_id).name,
        version=version.name,
        state=RolloutState(rollout.state),
        stage=rollout.stage,
        stages=len(strategy.stages),
        target=RolloutTarget.model_validate(rollout.target),
        strategy=strategy,
        delivery=Delivery.model_validate(rollout.delivery) if rollout.delivery else None,
        counts=counts,
        verdicts=[StageVerdict.model_validate(verdict) for verdict in rollout.verdicts],
        created_by=rollout.created_by,
        approvals_needed=rollout.approvals_needed,
        approvals=[Approval.model_validate(one) for one in rollout.approvals],
        created_at=rollout.created_at,
        finished_at=rollout.finished_at,
    )


def deployment_view(row: repository.DeploymentRow) -> DeploymentView:
    """The HTTP shape of a deployment."""
    deployment, variant, version, model, profile = row
    took, ended = None, deployment.phase in repository.SETTLED_PHASES
    if deployment.serving_at is not None and deployment.sent_at is not None:
        took = (deployment.serving_at - deployment.sent_at).total_seconds()
    return DeploymentView(
        id=deployment.id,
        rollout_id=deployment.rollout_id,
        device_id=deployment.device_id,
        model=model.name,
        version=version.name,
        variant_id=variant.id,
        profile=profile.name,
        stage=deployment.stage,
        phase=deployment.phase,
        desired=deployment.desired,
        failure=Failure.model_validate(deployment.failure) if deployment.failure else None,
        probation=ProbationView.model_validate(deployment.probation) if deployment.probation else None,
        waiting=Waiting.model_validate(deployment.waiting) if deployment.waiting and not ended else None,
        artifact_bytes=variant.size or 0,
        received_bytes=deployment.received_bytes,
        encoding=deployment.encoding,
        sources=deployment.sources,
        deploy_s=took,
        created_at=deployment.created_at,
        sent_at=deployment.sent_at,
        settled_at=deployment.settled_at,
    )


def _list(names: Iterable[str]) -> str:
    shown = list(names)
    rest = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return ", ".join(shown[:_NAMED]) + rest
