"""Events of rollouts and deployments: what became of them, for whoever subscribed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import object_session

from agent.protocol.lifecycle import SETTLED
from fleet_server import events
from fleet_server.models import Deployment, Model, Rollout, Version

_TYPES = {
    "create": "created",
    "wait": "awaiting_approval",
    "approve": "approved",
    "reject": "rejected",
    "start": "started",
    "prepare": "preparing",
    "advance": "stage_advanced",
    "pause": "paused",
    "resume": "resumed",
    "stop": "stopped",
    "abort": "stopped",
    "revert": "reverting",
    "succeed": "succeeded",
}
_ENDS = frozenset(phase.value for phase in SETTLED)


def rollout_decided(rollout: Rollout, decision: str, reason: str) -> None:
    """Tell what was decided about a rollout: `shoal.rollout.paused` and so on."""
    session = object_session(rollout)
    if session is None:
        return

    def data() -> dict[str, Any]:
        version = session.get_one(Version, rollout.version_id)
        return {
            "id": rollout.id,
            "name": rollout.name,
            "model": session.get_one(Model, version.model_id).name,
            "version": version.name,
            "state": rollout.state,
            "stage": rollout.stage,
            "stages": len(rollout.strategy["stages"]),
            "decision": decision,
            "reason": reason,
        }

    kind = f"shoal.rollout.{_TYPES.get(decision, decision)}"
    events.emit(session, fleet_id=rollout.fleet_id, kind=kind, subject=f"rollout/{rollout.id}", data=data)


def deployment_moved(deployment: Deployment, before: str) -> None:
    """Tell where a deployment ended: `shoal.deployment.active`, `.failed` and so on; not each step on the way."""
    if deployment.phase != before and deployment.phase in _ENDS:
        _tell(deployment, deployment.phase, {"before": before, "failure": deployment.failure})


def deployment_fell_back(deployment: Deployment, provider: str) -> None:
    """Tell that another execution provider runs it than was wanted first, and why: `shoal.deployment.fell_back`."""
    _tell(deployment, "fell_back", {"provider": provider, "reason": deployment.fell_back})


def _tell(deployment: Deployment, what: str, more: Mapping[str, Any]) -> None:
    session = object_session(deployment)
    if session is None:
        return

    def data() -> dict[str, Any]:
        version = session.get_one(Version, deployment.version_id)
        return {
            "id": deployment.id,
            "rollout_id": deployment.rollout_id,
            "device_id": deployment.device_id,
            "model": session.get_one(Model, version.model_id).name,
            "version": version.name,
            "phase": deployment.phase,
            "reverts": deployment.revert_of or None,
            **more,
        }

    kind, subject = f"shoal.deployment.{what}", f"deployment/{deployment.id}"
    events.emit(session, fleet_id=deployment.fleet_id, kind=kind, subject=subject, data=data)
