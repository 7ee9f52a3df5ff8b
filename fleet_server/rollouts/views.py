"""HTTP shapes of rollouts and deployments, from their rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy.orm import Session

from fleet_server.devices.delivery import Delivery
from fleet_server.domain.states import RolloutState
from fleet_server.domain.strategy import RolloutStrategy, RolloutTarget
from fleet_server.models import Model, Rollout, Version
from fleet_server.rollouts import repository
from fleet_server.rollouts.repository import SCHEDULED, PhaseCount
from fleet_server.rollouts.schemas import (
    Approval,
    DeploymentView,
    ProbationView,
    RolloutCounts,
    RolloutView,
    StageVerdict,
)
from fleet_server.schemas import Failure, Waiting


def rollout_view(session: Session, rollout: Rollout) -> RolloutView:
    """The HTTP shape of a rollout."""
    return rollout_views(session, [rollout])[rollout.id]


def rollout_views(session: Session, rollouts: Sequence[Rollout]) -> dict[str, RolloutView]:
    """The HTTP shapes of rollouts by their ids, from two queries for all of them."""
    counts: dict[str, list[PhaseCount]] = defaultdict(list)
    for found in repository.counts(session, [one.id for one in rollouts]):
        counts[found.rollout_id].append(found)
    versions = repository.with_models(session, rollouts)
    return {one.id: _view(one, *versions[one.version_id], counts[one.id]) for one in rollouts}


def _view(rollout: Rollout, version: Version, model: Model, counted: Sequence[PhaseCount]) -> RolloutView:
    strategy = RolloutStrategy.model_validate(rollout.strategy)
    phases = {one.phase: one.deployments for one in counted}
    ended = sum(phases.get(phase, 0) for phase in ("failed", "rolled_back"))
    counts = RolloutCounts(
        total=sum(phases.values()),
        scheduled=phases.get(SCHEDULED, 0),
        active=phases.get("active", 0),
        failed=ended,
        superseded=phases.get("superseded", 0),
        waiting=sum(one.waiting for one in counted if one.phase not in repository.SETTLED_PHASES),
        in_progress=sum(phases.values())
        - ended
        - sum(phases.get(phase, 0) for phase in (SCHEDULED, "active", "superseded")),
    )
    return RolloutView(
        id=rollout.id,
        name=rollout.name,
        model=model.name,
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
        attempt=deployment.attempt,
        phase=deployment.phase,
        desired=deployment.desired,
        failure=Failure.model_validate(deployment.failure) if deployment.failure else None,
        probation=ProbationView.model_validate(deployment.probation) if deployment.probation else None,
        loading_s=deployment.loading_s,
        fell_back=deployment.fell_back,
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
