"""Makes deployments what their devices ought to run, and takes that back: within rates and caps, a piece at a time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from agent.protocol.lifecycle import SETTLED, Phase
from fleet_server.clock import utc_now
from fleet_server.deltas import service as deltas
from fleet_server.domain.machine import Allowance, Candidate, Underway, choose, rate_now, refill
from fleet_server.domain.strategy import ExposureSpec, RolloutStrategy
from fleet_server.models import Deployment, Device, Rollout
from fleet_server.rollouts import announcements, evidence, repository
from fleet_server.rollouts.desired import queue_all
from fleet_server.settings import Settings

FEATURE = "exposure"  # of agents that can run a version beside another
AT_ONCE = 500  # devices that one transaction tells: others wait for it


def send_due(session: Session, settings: Settings, rollout: Rollout) -> int:
    """Send what is due of the open stages, as far as rate and caps allow.

    Those for whose devices a difference is being made wait for it, for a while: what is small then is worth it.

    Returns:
        How many were sent.
    """
    strategy = RolloutStrategy.model_validate(rollout.strategy)
    underway = Underway(repository.underway_count(session, rollout.id))
    if strategy.caps.tag and strategy.caps.per_value:
        by_value = repository.underway_by_value(session, rollout.id, strategy.caps.tag)
        underway = Underway(underway.total, by_value)
    full = [value for value, count in underway.by_value.items() if count >= (strategy.caps.per_value or 0)]
    rows = repository.due(session, rollout.id, rollout.stage, strategy.caps.tag, full, limit=4 * AT_ONCE)
    if not rows:
        return 0
    held_back = _awaiting(session, settings, rollout)
    candidates = [Candidate(one.id, value or "") for one, value in rows if one.id not in held_back]
    tokens = AT_ONCE
    if strategy.rate is not None:
        active = repository.phase_counts(session, rollout.id).get(Phase.ACTIVE.value, 0)
        tokens = min(tokens, _allowed(rollout, rate_now(strategy.rate, active)))
    chosen = set(choose(strategy, candidates, underway, tokens))
    desire(session, settings, [one for one, _ in rows if one.id in chosen])
    if strategy.rate is not None:
        _spend(rollout, len(chosen))
    return len(chosen)


def differences_wait(session: Session, settings: Settings, rollout: Rollout) -> int:
    """How many of those that are due wait for a difference to be made."""
    return len(_awaiting(session, settings, rollout))


def _awaiting(session: Session, settings: Settings, rollout: Rollout) -> set[str]:
    waited = utc_now() - (rollout.stage_started_at or utc_now()) >= dt.timedelta(seconds=settings.delta_wait_s)
    return set() if waited else deltas.awaiting(session, settings, rollout.id, rollout.stage)


def take_back_due(session: Session, settings: Settings, rollout: Rollout) -> int:
    """Of a rollout that reverts: take devices back, as far as the rate allows; how many are still to come."""
    per_minute = RolloutStrategy.model_validate(rollout.strategy).revert_per_minute
    tokens = AT_ONCE if per_minute is None else min(AT_ONCE, _allowed(rollout, per_minute))
    rows = repository.to_take_back(session, rollout.id, limit=tokens)
    take_back(session, settings, rows)
    if per_minute is not None:
        _spend(rollout, len(rows))
    return repository.to_take_back_count(session, rollout.id)


def desire(session: Session, settings: Settings, deployments: Sequence[Deployment]) -> None:
    """Let deployments of one rollout be what their devices ought to run, and tell the devices."""
    if not deployments:
        return
    device_ids = [one.device_id for one in deployments]
    for before in repository.desired_on(session, device_ids, deployments[0].model_id).values():
        for one in before:
            one.desired = False
    session.flush()  # before others are: the database takes no two
    devices = repository.by_id(session, Device, device_ids)
    strategy = RolloutStrategy.model_validate(session.get_one(Rollout, deployments[0].rollout_id).strategy)
    evidence.note_before(session, strategy, [one for one in deployments if not one.revert_of])
    for one in deployments:
        one.desired, one.phase, one.sent_at = True, Phase.PENDING.value, utc_now()
        if not one.revert_of:
            one.exposure = _exposure(strategy.exposure, one, devices[one.device_id])
    session.flush()
    queue_all(session, settings, [devices[one.device_id] for one in deployments])


def _exposure(spec: ExposureSpec | None, deployment: Deployment, device: Device) -> dict[str, Any] | None:
    """How a device is to run a version beside the one before; None where it can't, or need not."""
    if spec is None or not deployment.previous_id or FEATURE not in device.facts.get("features", ()):
        return None
    return {"mode": spec.mode, "share": spec.share}


def let_in(session: Session, settings: Settings, rollout: Rollout) -> None:
    """Let a version serve in full where it ran beside the one before for as long as it should."""
    spec = RolloutStrategy.model_validate(rollout.strategy).exposure
    if spec is None:
        return
    since = utc_now() - dt.timedelta(seconds=spec.for_s)
    found = repository.exposed(session, rollout.id, since, limit=AT_ONCE)
    for deployment in found:
        deployment.exposure = None
    session.flush()
    devices = repository.by_id(session, Device, {one.device_id for one in found})
    queue_all(session, settings, list(devices.values()))


def supersede_one(deployment: Deployment, detail: str, *, code: str = "superseded") -> None:
    """Let a deployment have ended, whatever its device comes to say of it: the device is sent something else."""
    deployment.phase, deployment.settled_at = Phase.SUPERSEDED.value, utc_now()
    deployment.failure = {"code": code, "detail": detail}


def take_back(session: Session, settings: Settings, deployments: Sequence[Deployment]) -> None:
    """Send devices to what they ran before deployments of one model; where that was nothing, take the model off.

    What was under way has ended by that: a device that never heard of it has nothing to say of it.
    """
    before = repository.by_id(session, Deployment, {one.previous_id for one in deployments if one.previous_id})
    backs = []
    for one in deployments:
        if Phase(one.phase) not in SETTLED:
            before_that = one.phase
            supersede_one(one, "the device was taken back before this had served to the end of its probation")
            announcements.deployment_moved(one, before_that)
        previous = before.get(one.previous_id or "")
        if previous is None:
            one.desired = False
            continue
        backs.append(
            Deployment(
                fleet_id=one.fleet_id,
                rollout_id=one.rollout_id,
                device_id=one.device_id,
                model_id=one.model_id,
                version_id=previous.version_id,
                variant_id=previous.variant_id,
                previous_id=previous.previous_id,
                revert_of=one.id,
                stage=one.stage,
                place=one.place,
            )
        )
    session.add_all(backs)
    session.flush()
    emptied = {one.device_id for one in deployments} - {one.device_id for one in backs}
    queue_all(session, settings, list(repository.by_id(session, Device, emptied).values()))
    desire(session, settings, backs)


def _allowed(rollout: Rollout, per_minute: float) -> int:
    """How many devices a rate allows now; what it allows is kept with the rollout."""
    kept = rollout.pacing or {}
    known = Allowance(kept.get("tokens", 1.0), kept.get("at", utc_now().timestamp()))
    allowance = refill(known, per_minute, utc_now().timestamp())
    rollout.pacing = {"tokens": allowance.tokens, "at": allowance.at}
    return int(allowance.tokens)


def _spend(rollout: Rollout, count: int) -> None:
    kept = rollout.pacing or {}
    rollout.pacing = {**kept, "tokens": kept.get("tokens", 0.0) - count}
