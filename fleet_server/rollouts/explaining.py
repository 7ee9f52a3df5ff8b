"""Says what a rollout does now and why, from the picture that the engine decides by: reads, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sqlalchemy.orm import Session

from fleet_server.domain.machine import decide
from fleet_server.domain.rules import Standing
from fleet_server.domain.states import RolloutState
from fleet_server.domain.strategy import RolloutStrategy
from fleet_server.models import Rollout
from fleet_server.rollouts import evidence, repository
from fleet_server.rollouts.engine import picture
from fleet_server.rollouts.schemas import HeldDevice, RolloutExplanation, RuleStanding, StageVerdict
from fleet_server.settings import Settings

LARGEST = 700.0  # natural logarithm of what JSON can say


def explain(session: Session, settings: Settings, rollout: Rollout) -> RolloutExplanation:
    """What a rollout does now and why, where each stop rule stands, and every decision so far."""
    strategy = RolloutStrategy.model_validate(rollout.strategy)
    sent = repository.sent_by_profile(session, rollout.id)
    standings = evidence.standings(session, rollout, evidence.outcomes(session, rollout, sent))
    return RolloutExplanation(
        id=rollout.id,
        state=RolloutState(rollout.state),
        stage=rollout.stage,
        stages=len(strategy.stages),
        now=_now(session, settings, rollout, strategy, sent, standings),
        rules=[_view(one) for one in standings],
        held=[
            HeldDevice(device_id=device_id, reason=hold["reason"])
            for device_id, hold in repository.held_devices(session, rollout.id)
        ],
        verdicts=[StageVerdict.model_validate(one) for one in rollout.verdicts],
    )


def _now(
    session: Session,
    settings: Settings,
    rollout: Rollout,
    strategy: RolloutStrategy,
    sent: Mapping[str, Mapping[str, int]],
    standings: Sequence[Standing],
) -> str:
    if rollout.state == RolloutState.RUNNING.value:
        return decide(strategy, picture(session, settings, rollout, sent, standings)).reason
    if rollout.state == RolloutState.REVERTING.value:
        left = repository.to_take_back_count(session, rollout.id)
        waits = repository.unsettled_backs(session, rollout.id)
        return f"{left} devices are still to be taken back, and {waits} that were told have not settled"
    last = StageVerdict.model_validate(rollout.verdicts[-1]) if rollout.verdicts else None
    return f"{last.decision}: {last.reason}" if last else "nothing was decided yet"


def _view(one: Standing) -> RuleStanding:
    return RuleStanding(
        metric=one.rule.metric.value,
        above=one.rule.above,
        against=one.rule.against if one.rule.metric.relative else "",
        confidence=one.rule.sure,
        value=one.value,
        samples=one.samples,
        devices=one.devices,
        evidence=math.exp(min(one.evidence, LARGEST)),
        needed=math.exp(one.needed),
        profile=one.profile,
        stops=one.stops,
        reason=one.reason,
    )
