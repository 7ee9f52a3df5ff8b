"""Rules of two-person approval. Each function works in its caller's transaction, on a rollout that it has locked."""

from __future__ import annotations

from sqlalchemy.orm import Session

from fleet_server import audit
from fleet_server.clock import utc_now
from fleet_server.domain.states import RolloutState, approval_refusal
from fleet_server.errors import ConflictError, ForbiddenError
from fleet_server.models import Rollout
from fleet_server.principals import Actor
from fleet_server.rollouts import service
from fleet_server.rollouts.schemas import Approval, RolloutDecision
from fleet_server.settings import Settings


def approve(session: Session, settings: Settings, rollout: Rollout, decision: RolloutDecision, *, actor: Actor) -> None:
    """Count an approval; with the last one that is needed the rollout starts.

    Raises:
        ForbiddenError: for who created it, or approved it before.
        ConflictError: when it does not wait for approvals, or can't start: then this approval does not count either.
    """
    _check_waits(rollout)
    refusal = approval_refusal(rollout.creator_id, [one["id"] for one in rollout.approvals], actor.id)
    if refusal is not None:
        raise ForbiddenError("approval_not_yours", refusal)
    approval = Approval(by=actor.name, id=actor.id, at=utc_now(), comment=decision.comment)
    rollout.approvals = [*rollout.approvals, approval.model_dump(mode="json")]
    said = f"by {actor.name}" + (f": {decision.comment}" if decision.comment else "")
    if len(rollout.approvals) >= rollout.approvals_needed:
        service.move(session, rollout, RolloutState.RUNNING, "approve", said, actor=actor)
        service.begin_approved(session, settings, rollout)
        return
    service.add_verdict(rollout, "approve", f"{said}; {rollout.approvals_needed - len(rollout.approvals)} more needed")
    audit.record(
        session,
        fleet_id=rollout.fleet_id,
        actor=actor,
        action="rollout.approve",
        subject=f"rollout/{rollout.id}",
        detail={"comment": decision.comment},
    )


def reject(session: Session, rollout: Rollout, decision: RolloutDecision, *, actor: Actor) -> None:
    """End a rollout that waits.

    Raises:
        ConflictError: when it does not wait for approvals.
    """
    _check_waits(rollout)
    said = f"by {actor.name}" + (f": {decision.comment}" if decision.comment else "")
    service.move(session, rollout, RolloutState.STOPPED, "reject", said, actor=actor)


def _check_waits(rollout: Rollout) -> None:
    if rollout.state != RolloutState.AWAITING_APPROVAL.value:
        raise ConflictError("not_awaiting_approval", f"the rollout is {rollout.state}: it waits for no approval")
