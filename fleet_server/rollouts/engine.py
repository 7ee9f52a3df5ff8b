"""Advances rollouts: a tick under a database lease judges each one and carries out what the policy decides."""

from __future__ import annotations

import datetime as dt
import logging
import threading
from collections.abc import Sequence

from sqlalchemy.orm import Session

from fleet_server.db import Database, utc_now
from fleet_server.leases import DatabaseLease
from fleet_server.models import Deployment, Rollout, Variant
from fleet_server.rollouts import repository, service
from fleet_server.rollouts.policy import Action, Measure, Snapshot, decide
from fleet_server.rollouts.schemas import RolloutState, RolloutStrategy, StopMetric
from fleet_server.settings import Settings
from fleet_server.telemetry.service import summarize

log = logging.getLogger(__name__)
LEASE = "rollout-engine"
LEASE_S = 10.0
CONTROL_WINDOW = dt.timedelta(hours=1)


class RolloutEngine:
    """The thread that judges rollouts; of several servers on one database, one at a time."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._lease = DatabaseLease(database, LEASE, LEASE_S)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to tick."""
        self._thread = threading.Thread(target=self._loop, name="rollout-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and give the lease back."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(30)
        self._lease.give_back()

    def _loop(self) -> None:
        while not self._stopping.wait(self._settings.engine_tick_s):
            try:
                self.tick()
            except Exception:
                log.exception("a tick of the rollout engine failed; it goes on")

    def tick(self) -> None:
        """Judge every open rollout, each in a transaction of its own."""
        with self._database.read() as session:
            rollouts = repository.open_rollouts(session)
        if not rollouts or not self._lease.hold():
            return
        for rollout_id in rollouts:
            with self._database.write() as session:
                advance(session, self._settings, session.get_one(Rollout, rollout_id))


def advance(session: Session, settings: Settings, rollout: Rollout) -> None:
    """Judge one rollout and carry out the decision."""
    deployments = repository.deployments(session, rollout.id)
    if rollout.state == RolloutState.REVERTING.value:
        _finish_revert(session, rollout, deployments)
        return
    if rollout.state != RolloutState.RUNNING.value:
        return
    due = any(one.phase == service.SCHEDULED and one.stage <= rollout.stage for one in deployments)
    # Some may wait for a difference, for a while: then the stage is not over, though it may be stopped.
    whole = not due or service.send_stage(session, settings, rollout)
    decision = decide(RolloutStrategy.model_validate(rollout.strategy), _snapshot(session, rollout, deployments))
    match decision.action:
        case Action.ADVANCE if whole:
            rollout.stage += 1
            rollout.stage_started_at = utc_now()
            service.add_verdict(rollout, "advance", decision.reason)
            service.send_stage(session, settings, rollout)
        case Action.SUCCEED if whole:
            if not any(deployment.phase == "active" for deployment in deployments):
                service.finish(session, rollout, RolloutState.STOPPED, "stop", "no device of it is left to run it")
            else:
                service.finish(session, rollout, RolloutState.SUCCEEDED, "succeed", decision.reason)
        case Action.PAUSE:
            service.pause(session, rollout, decision.reason, actor="server")
        case Action.REVERT:
            service.start_revert(session, settings, rollout, decision.reason, actor="server")
        case _:
            pass


def _finish_revert(session: Session, rollout: Rollout, deployments: Sequence[Deployment]) -> None:
    backs = [deployment for deployment in deployments if deployment.revert_of]
    if all(back.phase in repository.SETTLED_PHASES for back in backs):
        good = sum(back.phase == "active" for back in backs)
        reason = f"{good} of {len(backs)} devices run again what they ran before"
        service.finish(session, rollout, RolloutState.REVERTED, "reverted", reason)


def _snapshot(session: Session, rollout: Rollout, deployments: Sequence[Deployment]) -> Snapshot:
    sent = [one for one in deployments if one.phase != service.SCHEDULED and one.sent_at and not one.revert_of]
    settled = [one for one in sent if one.phase in repository.SETTLED_PHASES]
    waiting = [one.device_id for one in sent if one.phase not in repository.SETTLED_PHASES]
    last = max((one.settled_at for one in settled if one.settled_at), default=None)
    return Snapshot(
        stage=rollout.stage,
        sent=len(sent),
        settled=len(settled),
        failed=sum(one.phase in {"failed", "rolled_back"} for one in settled),
        offline=len(waiting) - len(repository.online(session, waiting)),
        settled_for_s=(utc_now() - last).total_seconds() if last and not waiting else None,
        measures=_measures(session, rollout, sent),
    )


def _measures(session: Session, rollout: Rollout, sent: list[Deployment]) -> dict[StopMetric, Measure]:
    """What telemetry says of the cohort: only of windows of this rollout's own deployments."""
    if not sent:
        return {}
    found: dict[StopMetric, Measure] = {}
    cohort = summarize(session, rollout.fleet_id, deployment_ids=[one.id for one in sent], by_device=False)
    for total in cohort:
        if total.requests:
            found[StopMetric.ERROR_PERCENT] = Measure(100 * total.errors / total.requests, total.requests)
        if total.latency_p95_ms is not None:
            found[StopMetric.LATENCY_P95_MS] = Measure(total.latency_p95_ms, total.requests)
    ratio = _worst(_latency_ratio(session, rollout, part) for part in _by_variant(sent))
    if ratio is not None:
        found[StopMetric.LATENCY_P95_RATIO] = ratio
    drop = _worst(_accuracy_drop(session, rollout, part) for part in _by_variant(sent))
    if drop is not None:
        found[StopMetric.ACCURACY_DROP_POINTS] = drop
    return found


def _by_variant(sent: list[Deployment]) -> list[list[Deployment]]:
    parts: dict[str, list[Deployment]] = {}
    for one in sent:
        parts.setdefault(one.variant_id, []).append(one)
    return list(parts.values())


def _worst(measures: object) -> Measure | None:
    known = [one for one in measures if one is not None]  # type: ignore[attr-defined]
    return max(known, key=lambda one: one.value, default=None)


def _latency_ratio(session: Session, rollout: Rollout, part: list[Deployment]) -> Measure | None:
    """p95 of one profile's devices against what the same devices had, in the last hour, before they were sent it."""
    before = [one.previous_id for one in part if one.previous_id]
    if not before:
        return None
    since = min(one.sent_at for one in part if one.sent_at) - CONTROL_WINDOW
    old = summarize(session, rollout.fleet_id, deployment_ids=before, since=since, by_device=False)
    new = summarize(session, rollout.fleet_id, deployment_ids=[one.id for one in part], by_device=False)
    if not old or not new or not old[0].latency_p95_ms or new[0].latency_p95_ms is None:
        return None
    return Measure(new[0].latency_p95_ms / old[0].latency_p95_ms, new[0].requests)


def _accuracy_drop(session: Session, rollout: Rollout, part: list[Deployment]) -> Measure | None:
    """Accuracy on labelled feedback against what the gate measured of the variant, in percentage points."""
    measured = (session.get_one(Variant, part[0].variant_id).measurements or {}).get("accuracy")
    new = summarize(session, rollout.fleet_id, deployment_ids=[one.id for one in part], by_device=False)
    if measured is None or not new or new[0].accuracy is None:
        return None
    return Measure(max(0.0, (measured - new[0].accuracy) * 100), new[0].labelled)
