"""Rules of rollouts and deployments. Each function works in its caller's transaction."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sqlalchemy.orm import Session

from agent.protocol.lifecycle import Phase
from fleet_server import audit, spans
from fleet_server.agent_releases import service as releases
from fleet_server.clock import utc_now
from fleet_server.devices import service as device_service
from fleet_server.domain.stages import assign_stages
from fleet_server.domain.states import RolloutState, RolloutTransitionError, check_transition
from fleet_server.domain.strategy import RolloutStrategy, RolloutTarget, Stage
from fleet_server.errors import ConflictError, NotFoundError
from fleet_server.models import Deployment, Device, Fleet, Model, Rollout, Variant, Version
from fleet_server.principals import Who, id_of
from fleet_server.rollouts import announcements, repository, tracing
from fleet_server.rollouts.desired import manifest_of_variant, queue_desired
from fleet_server.rollouts.planning import Survey, named, refuse_busy, refuse_gaps, survey
from fleet_server.rollouts.repository import SCHEDULED
from fleet_server.rollouts.schemas import PinRequest, RolloutCreate, StageVerdict, Terms
from fleet_server.rollouts.sending import desire, send_due, supersede_one, take_back, take_back_due
from fleet_server.settings import Settings
from fleet_server.trust import service as trust

log = logging.getLogger(__name__)


def create(session: Session, settings: Settings, fleet_id: str, wanted: RolloutCreate, *, actor: Who) -> Rollout:
    """Start a rollout, or let it wait where its fleet asks for approvals.

    Raises:
        NotFoundError: for an unknown version, device or profile.
        InvalidError: when the target selects no device.
        ConflictError: when a device has no profile or its profile no ready variant, or is busy with another rollout,
            or when a variant is not signed.
    """
    wanted = wanted.fitting()
    version = releases.resolve(session, fleet_id, wanted.version)
    plan = _checked(session, settings, version, wanted)
    needed = session.get_one(Fleet, fleet_id).approvals
    parent = spans.current()
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
        traceparent=parent.text if parent is not None and parent.sampled else None,
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
        _begin(session, settings, rollout, wanted, plan)
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
    plan = _checked(session, settings, version, wanted)
    others = sorted(name for name, digest in plan.artifacts.items() if terms.artifacts.get(name) != digest)
    if others:
        raise ConflictError(
            "artifact_changed",
            f"since it was created the variant for {named(others)} is another: that one was not approved; abort this "
            "rollout and create it again",
        )
    _begin(session, settings, rollout, wanted, plan)


def _checked(session: Session, settings: Settings, version: Version, wanted: RolloutCreate) -> Survey:
    """The devices and variants, when nothing is in the way; else refused."""
    plan = survey(session, version, wanted.target)
    refuse_gaps(plan, wanted.version, allow_unproven=wanted.allow_unproven)
    if wanted.on_busy == "refuse":
        refuse_busy(plan.busy)
    paths = [_wanted(session, version.fleet_id, one) for one in plan.variants.values()]
    trust.require_signed(session, settings, version.fleet_id, paths, wanted.version)
    return plan


def _wanted(session: Session, fleet_id: str, variant: Variant) -> str:
    """The target path of what must be signed; a release's was wanted when it was pushed."""
    if variant.is_release:
        return releases.manifest_of(variant).target_path
    return trust.want(session, fleet_id, manifest_of_variant(variant))


def _begin(session: Session, settings: Settings, rollout: Rollout, wanted: RolloutCreate, plan: Survey) -> None:
    superseded = _settle_busy(session, plan.busy, supersede=wanted.on_busy == "supersede")
    stages = assign_stages(plan.members(), wanted.strategy, rollout.name)
    devices = {device.id: device for device in plan.devices}
    version = session.get_one(Version, rollout.version_id)
    rollout.began_at = rollout.stage_started_at = utc_now()
    running = repository.desired_on(session, list(devices), version.model_id)
    for place, (device_id, stage) in enumerate(stages.items()):
        device, current = devices[device_id], running.get(device_id, ())
        add_deployment(session, rollout, version, device, plan.variant_of(device), stage, place, current=current)
    session.flush()
    left_out = "".join(f"; left out, for {why}: {named(ids)}" for why, ids in sorted(plan.left_out.items()))
    add_verdict(rollout, "start", f"{len(devices)} devices in {len(wanted.strategy.stages)} stages{left_out}")
    send_due(session, settings, rollout)
    # Not in the first stage: until its own stage comes the device goes back, or it would finish what was ended.
    take_back(session, settings, [one for one in superseded if one.desired and not one.revert_of])


def _settle_busy(session: Session, busy: Sequence[Deployment], *, supersede: bool) -> Sequence[Deployment]:
    """End what other open rollouts have not settled on these devices, or refuse; returns what was ended."""
    if not supersede:
        refuse_busy(busy)
    for deployment in busy:
        supersede_one(deployment, "a newer rollout of the model took the device over")
    session.flush()
    return busy


def add_deployment(
    session: Session,
    rollout: Rollout,
    version: Version,
    device: Device,
    variant: Variant,
    stage: int,
    place: int,
    *,
    current: Sequence[Deployment],
    attempt: int = 0,
) -> Deployment:
    """A device's part in a rollout; nothing is sent yet. `current` is what the device ought to run of the model."""
    deployment = Deployment(
        fleet_id=rollout.fleet_id,
        rollout_id=rollout.id,
        device_id=device.id,
        model_id=version.model_id,
        version_id=version.id,
        variant_id=variant.id,
        previous_id=_working(session, current[0]) if current else None,
        stage=stage,
        place=place,
        attempt=attempt,
    )
    session.add(deployment)
    return deployment


def _working(session: Session, deployment: Deployment) -> str | None:
    """The deployment a device would go back to: the newest before that served, or that takes it back to one."""
    seen: Deployment | None = deployment
    while seen is not None and seen.phase != Phase.ACTIVE.value and not seen.revert_of:
        seen = session.get(Deployment, seen.previous_id) if seen.previous_id else None
    return seen.id if seen else None


def pause(session: Session, rollout: Rollout, reason: str, *, actor: Who) -> None:
    """Send no further stage; what was sent goes on."""
    move(session, rollout, RolloutState.PAUSED, "pause", reason, actor=actor)


def resume(session: Session, settings: Settings, rollout: Rollout, *, actor: Who) -> None:
    """Go on with a paused rollout, whose deadline begins anew; one that waits for approvals goes on by those alone.

    Raises:
        ConflictError: when it is not paused.
    """
    if rollout.state == RolloutState.AWAITING_APPROVAL.value:
        raise ConflictError("awaiting_approval", f"it waits for approvals: `shoal rollout approve {rollout.id}`")
    move(session, rollout, RolloutState.RUNNING, "resume", "asked to go on", actor=actor)
    rollout.began_at = utc_now()
    send_due(session, settings, rollout)


def promote(session: Session, settings: Settings, rollout: Rollout, *, full: bool, actor: Who) -> None:
    """Let the next stage begin where it waits for that; with `full` all of them at once, unwatched.

    Raises:
        ConflictError: when it does not run, or has no further stage.
    """
    last = len(RolloutStrategy.model_validate(rollout.strategy).stages) - 1
    if rollout.state != RolloutState.RUNNING.value or rollout.stage >= last:
        raise ConflictError(
            "nothing_to_promote",
            f"it is {rollout.state} in stage {rollout.stage + 1} of {last + 1}: see `shoal rollout show {rollout.id}`",
        )
    rollout.let_on = last if full else rollout.stage + 1
    reason = "all stages at once" if full else f"stage {rollout.stage + 2} may begin"
    add_verdict(rollout, "promote", f"{reason}, by {actor}")
    if full:
        tracing.stages_ended(session, rollout, last - 1)
        rollout.stage, rollout.stage_started_at = last, utc_now()
        send_due(session, settings, rollout)
    audit.record(
        session,
        fleet_id=rollout.fleet_id,
        actor=actor,
        action="rollout.promote",
        subject=f"rollout/{rollout.id}",
        detail={"full": full},
    )


def retry(session: Session, settings: Settings, rollout: Rollout, *, actor: Who) -> None:
    """Try again on the devices that failed or went back by themselves, and on no other.

    Raises:
        ConflictError: when it does not run and did not succeed, or none failed.
    """
    again = [one for one in repository.failed(session, rollout.id) if not one.replaced]
    if not again:
        raise ConflictError("nothing_to_retry", "no deployment of it has failed")
    if rollout.state != RolloutState.RUNNING.value:
        move(session, rollout, RolloutState.RUNNING, "retry", f"{len(again)} devices that failed", actor=actor)
        rollout.finished_at = None
    else:
        add_verdict(rollout, "retry", f"{len(again)} devices that failed, by {actor}")
        audit.record(
            session, fleet_id=rollout.fleet_id, actor=actor, action="rollout.retry", subject=f"rollout/{rollout.id}"
        )
    for deployment in again:
        try_again(session, rollout, deployment)
    session.flush()
    send_due(session, settings, rollout)


def try_again(session: Session, rollout: Rollout, deployment: Deployment) -> Deployment:
    """A new deployment in the place of one that failed; nothing is sent yet."""
    deployment.replaced = True
    session.flush()
    return add_deployment(
        session,
        rollout,
        session.get_one(Version, deployment.version_id),
        session.get_one(Device, deployment.device_id),
        session.get_one(Variant, deployment.variant_id),
        deployment.stage,
        deployment.place,
        current=repository.desired(session, deployment.device_id, deployment.model_id),
        attempt=deployment.attempt + 1,
    )


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
    rollout.pacing = None
    take_back_due(session, settings, rollout)


def pin(
    session: Session, settings: Settings, fleet_id: str, device_id: str, wanted: PinRequest, *, actor: Who
) -> Rollout:
    """Send a device a version by a rollout of its own, and hold it, so that no other rollout moves it.

    Raises:
        NotFoundError: for an unknown device or version.
        ConflictError: as `create`, or where the fleet asks for approvals, which take longer than this does.
    """
    if session.get_one(Fleet, fleet_id).approvals:
        raise ConflictError(
            "approvals_needed",
            f"this fleet asks for approvals: `shoal rollout create {wanted.version} --device {device_id}`, and when it "
            f"succeeded `shoal device hold {device_id}`",
        )
    device = device_service.get_device(session, fleet_id, device_id)
    if device.hold:
        device_service.release_device(session, fleet_id, device_id, actor=actor)
        session.flush()
    rollout = create(
        session,
        settings,
        fleet_id,
        RolloutCreate(
            version=wanted.version,
            name=f"{wanted.version} pinned to {device_id}",
            target=RolloutTarget(devices=[device_id]),
            strategy=RolloutStrategy(stages=[Stage(percent=100)]),
            allow_unproven=wanted.allow_unproven,
            on_busy="supersede",
        ),
        actor=actor,
    )
    due = repository.due(session, rollout.id, 0, None, (), limit=1)
    desire(session, settings, [one for one, _ in due])  # a difference that is being made is not waited for
    device_service.hold_device(session, fleet_id, device_id, wanted.reason, actor=actor)
    return rollout


def forget_device(session: Session, settings: Settings, fleet_id: str, device_id: str, *, actor: Who) -> None:
    """Forget a device and end its part in every rollout, so that none waits for it.

    Raises:
        NotFoundError: when the fleet has none of that id.
        ConflictError: when it is online.
    """
    device_service.forget_device(session, fleet_id, device_id, actor=actor)
    for deployment in repository.unsettled_of_device(session, device_id):
        supersede_one(deployment, "the device was forgotten", code="device_forgotten")
    for deployment in repository.desired(session, device_id):
        deployment.desired = False
    session.flush()
    queue_desired(session, settings, session.get_one(Device, device_id))


def _drop_scheduled(session: Session, rollout: Rollout, detail: str) -> None:
    for deployment in repository.deployments(session, rollout.id):
        if deployment.phase == SCHEDULED:
            supersede_one(deployment, detail)
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
    over = state in {RolloutState.SUCCEEDED, RolloutState.STOPPED, RolloutState.REVERTED}
    if over:
        rollout.finished_at = utc_now()
    tried_before = any(one["decision"] == "retry" for one in rollout.verdicts)
    add_verdict(rollout, decision, reason)
    if over and not tried_before:  # its span has an end, once
        tracing.rollout_ended(session, rollout)
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
    ids = {"rollout": rollout.id, "fleet": rollout.fleet_id}
    log.info("rollout %s, stage %d: %s: %s", rollout.id, rollout.stage, decision, reason, extra=ids)
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
