"""Advances rollouts: a tick under a database lease judges each one and carries out what the state machine decides.

Everything that a decision rests on is read, and everything that follows from it written, in one transaction: a server
that dies has done all of it or nothing, and another goes on.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from sqlalchemy.orm import Session

from agent.protocol.logs import log_ids, note_ids
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.domain.machine import Action, Picture, decide
from fleet_server.domain.rules import Standing
from fleet_server.domain.states import RolloutState
from fleet_server.domain.strategy import RolloutStrategy
from fleet_server.leases import DatabaseLease
from fleet_server.models import Rollout
from fleet_server.rollouts import evidence, joining, repository, sending, service, tracing
from fleet_server.rollouts.planning import named
from fleet_server.settings import Settings
from fleet_server.ticker import Ticker

log = logging.getLogger(__name__)
LEASE = "rollout-engine"
LEASE_S = 10.0
PREPARE = "prepare"  # a verdict
PREPARE_TOLD_S = 5.0  # of a stage's wait: most differences are made by then


class RolloutEngine:
    """The thread that judges rollouts; of several servers on one database, one at a time."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._lease = DatabaseLease(database, LEASE, LEASE_S)
        self._ticker = Ticker(LEASE, self.tick, settings.engine_tick_s)
        self._judgements = evidence.Judgements()

    def start(self) -> None:
        """Begin to tick."""
        self._ticker.start()

    def stop(self) -> None:
        """End the thread and give the lease back."""
        self._ticker.stop()
        self._lease.give_back()

    def tick(self) -> None:
        """Judge every open rollout, each in a transaction of its own; one that fails keeps no other waiting."""
        rollouts: Sequence[str] = ()
        if self._database.finds(repository.HAS_OPEN):
            with self._database.read() as session:
                rollouts = repository.open_rollouts(session)
        self._judgements.keep(rollouts)
        for rollout_id in rollouts:
            if not self._lease.hold():
                return
            try:
                with log_ids(rollout=rollout_id), self._database.write() as session:
                    rollout = session.get_one(Rollout, rollout_id, with_for_update=True)
                    parent = tracing.traced(rollout)
                    note_ids(fleet=rollout.fleet_id, **({"trace_id": parent.trace_id} if parent else {}))
                    advance(session, self._settings, rollout, self._judgements)
            except Exception:
                log.exception(
                    "rollout %s could not be judged; it is tried again", rollout_id, extra={"rollout": rollout_id}
                )


def advance(
    session: Session, settings: Settings, rollout: Rollout, judgements: evidence.Judgements | None = None
) -> None:
    """Judge one rollout and carry out the decision."""
    if rollout.state == RolloutState.REVERTING.value:
        _go_on_reverting(session, settings, rollout)
        return
    if rollout.state != RolloutState.RUNNING.value:
        return
    joining.join_late(session, rollout)
    _try_again(session, rollout)
    news = evidence.gather(session, rollout)
    sent = repository.sent_by_profile(session, rollout.id)
    ended = evidence.outcomes(session, rollout, sent)
    standings = (judgements or evidence.Judgements()).of(session, rollout, ended, news=news)
    strategy = RolloutStrategy.model_validate(rollout.strategy)
    seen = picture(session, settings, rollout, sent, standings)
    _tell_preparing(settings, rollout, seen)
    decision = decide(strategy, seen)
    match decision.action:
        case Action.WAIT:
            sending.send_due(session, settings, rollout)
            sending.let_in(session, settings, rollout)
        case Action.ADVANCE:
            tracing.stages_ended(session, rollout, rollout.stage)
            rollout.stage += 1
            rollout.stage_started_at = utc_now()
            service.add_verdict(rollout, "advance", decision.reason)
            sending.send_due(session, settings, rollout)
        case Action.SUCCEED:
            service.finish(session, rollout, RolloutState.SUCCEEDED, "succeed", decision.reason)
        case Action.STOP:
            service.finish(session, rollout, RolloutState.STOPPED, "stop", decision.reason)
        case Action.PAUSE:
            service.pause(session, rollout, decision.reason, actor="server")
        case Action.REVERT:
            service.start_revert(session, settings, rollout, decision.reason, actor="server")


def _tell_preparing(settings: Settings, rollout: Rollout, seen: Picture) -> None:
    """Say once a stage why devices are not told yet: who watches would see them scheduled, and nothing happen."""
    if not seen.differences or utc_now() - (rollout.stage_started_at or utc_now()) < dt.timedelta(
        seconds=PREPARE_TOLD_S
    ):
        return
    if not any(one["decision"] == PREPARE and one["stage"] == rollout.stage for one in rollout.verdicts):
        reason = (
            f"{seen.differences} devices wait, {settings.delta_wait_s:g} s at most, for a difference to what they hold"
        )
        service.add_verdict(rollout, PREPARE, reason)


def picture(
    session: Session,
    settings: Settings,
    rollout: Rollout,
    by_profile: Mapping[str, Mapping[str, int]],
    standings: Sequence[Standing],
) -> Picture:
    """A rollout as the state machine takes it, with how many that were sent are in each phase, by profile."""
    now = utc_now()
    strategy = RolloutStrategy.model_validate(rollout.strategy)
    phases: Counter[str] = Counter()
    for counts in by_profile.values():
        phases.update(counts)
    sent = sum(phases.values())
    settled = sum(phases.get(phase, 0) for phase in repository.SETTLED_PHASES)
    due, held = repository.due_counts(session, rollout.id, rollout.stage)
    last = repository.last_settled_at(session, rollout.id)
    return Picture(
        stage=rollout.stage,
        due=due,
        held=held,
        sent=sent,
        settled=settled,
        active=phases.get("active", 0),
        exposed=phases.get("exposed", 0),
        failed=phases.get("failed", 0) + phases.get("rolled_back", 0),
        retries=_retries(session, rollout, strategy),
        offline=repository.offline_count(session, rollout.id) if sent > settled else 0,
        settled_for_s=(now - last).total_seconds() if last and sent == settled else None,
        age_s=(now - (rollout.began_at or rollout.created_at)).total_seconds(),
        let_on=rollout.let_on,
        standings=standings,
        differences=sending.differences_wait(session, settings, rollout) if due else 0,
    )


def _retries(session: Session, rollout: Rollout, strategy: RolloutStrategy) -> int:
    if not strategy.retry.attempts:
        return 0
    failed = repository.failed(session, rollout.id, alone=True)
    return sum(one.attempt < strategy.retry.attempts for one in failed)


def _try_again(session: Session, rollout: Rollout) -> None:
    """Schedule what failed and has waited long enough anew, as often as the strategy says."""
    retry = RolloutStrategy.model_validate(rollout.strategy).retry
    if not retry.attempts:
        return
    for deployment in repository.failed(session, rollout.id, alone=True):
        wait = dt.timedelta(seconds=retry.wait_s * 2**deployment.attempt)
        if deployment.attempt < retry.attempts and utc_now() - (deployment.settled_at or utc_now()) >= wait:
            service.try_again(session, rollout, deployment)
    session.flush()


def _go_on_reverting(session: Session, settings: Settings, rollout: Rollout) -> None:
    """Take further devices back; when all that were sent back have settled, say how it went."""
    left = sending.take_back_due(session, settings, rollout)
    if left or repository.unsettled_backs(session, rollout.id):
        return
    backs = repository.taken_back(session, rollout.id)
    bad = [one.device_id for one in backs if one.phase in {"failed", "rolled_back"}]
    good = sum(one.phase == "active" for one in backs)
    reason = f"{good} of {len(backs)} devices run again what they ran before"
    alone = repository.phase_counts(session, rollout.id)
    gone = alone.get("failed", 0) + alone.get("rolled_back", 0)
    if gone:
        reason += f", {gone} went back by themselves or never left it"
    if bad:
        reason += f"; {named(bad)} did not take it: see `shoal rollout show {rollout.id}`"
        service.finish(session, rollout, RolloutState.STOPPED, "stop", reason)
    else:
        service.finish(session, rollout, RolloutState.REVERTED, "reverted", reason)
