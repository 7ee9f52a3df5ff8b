"""What devices say of their deployments, and what follows from it."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Mapping, Sequence

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.lifecycle import ENDED, SETTLED, TRANSITIONS, Phase
from agent.protocol.messages import DeploymentReport, Reported, ServingReport
from fleet_server.models import Deployment, Device, Rollout
from fleet_server.rollouts import announcements, repository, tracing
from fleet_server.rollouts.desired import queue_desired
from fleet_server.rollouts.repository import SCHEDULED
from fleet_server.rollouts.sending import take_back
from fleet_server.settings import Settings

log = logging.getLogger(__name__)
GONE_BACK = (Phase.FAILED.value, Phase.ROLLED_BACK.value)


def apply_reports(
    session: Session, settings: Settings, said: Sequence[tuple[Device, Reported]], now: dt.datetime
) -> None:
    """Bring deployments to where their devices say they are; each device is there once."""
    ids = {one.deployment_id for _, reported in said for one in (*reported.deployments, *reported.releases)}
    known = repository.by_id(session, Deployment, ids)
    rollouts = repository.by_id(session, Rollout, {one.rollout_id for one in known.values()})
    for device, reported in said:
        reports = {report.deployment_id: report for report in (*reported.deployments, *reported.releases)}
        serving = {one.deployment_id: one for one in reported.serving}
        for report in reports.values():
            deployment = known.get(report.deployment_id)
            if deployment is None or deployment.device_id != device.id:
                continue
            before = deployment.phase
            _apply(deployment, report, now, serves=deployment.id in serving)
            if deployment.phase != before:
                tracing.reported(session, rollouts[deployment.rollout_id], deployment, report, Phase(before), now)
            if deployment.id in serving:
                _note_provider(deployment, serving[deployment.id], now)
            if deployment.desired and deployment.phase in GONE_BACK:
                _follow_back(session, settings, device, deployment, reports)


def _note_provider(deployment: Deployment, serving: ServingReport, now: dt.datetime) -> None:
    """Keep why another execution provider runs it than the first wanted; the first time, tell of it."""
    deployment.fell_back = serving.fell_back
    if serving.fell_back and deployment.fell_back_at is None:
        deployment.fell_back_at = now
        announcements.deployment_fell_back(deployment, serving.provider)


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
        take_back(session, settings, [deployment])
        return
    deployment.desired = False
    session.flush()
    before.desired = True
    session.flush()
    queue_desired(session, settings, device)


def _apply(deployment: Deployment, report: DeploymentReport, now: dt.datetime, *, serves: bool) -> None:
    current = None if deployment.phase == SCHEDULED else Phase(deployment.phase)
    if current is None or not (_reaches(current, report.phase) or _tried_anew(deployment, current, report.phase)):
        return
    deployment.phase = report.phase.value
    deployment.received_bytes = max(deployment.received_bytes, report.received_bytes)
    deployment.encoding = report.encoding or deployment.encoding
    deployment.missing_chunks, deployment.attempts = report.missing_chunks, report.attempts
    if report.probation is not None:
        deployment.probation = msgspec.to_builtins(report.probation)
    deployment.sources = report.sources
    deployment.loading_s = report.loading_s
    deployment.waiting = msgspec.to_builtins(report.waiting) if report.waiting else None
    deployment.is_waiting = report.waiting is not None
    if report.phase is Phase.EXPOSED and deployment.exposed_at is None:
        deployment.exposed_at = now
    if report.failure is not None:
        deployment.failure = {"code": report.failure.code.value, "detail": report.failure.detail[:2000]}
    if serves and deployment.serving_at is None:
        deployment.serving_at = now
    if report.phase in SETTLED and current not in SETTLED:
        deployment.settled_at = now
    announcements.deployment_moved(deployment, current.value)
    _log(deployment, current)


def _tried_anew(deployment: Deployment, current: Phase, wanted: Phase) -> bool:
    """Whether a device that had gone on to another version follows this server, which was restored, back."""
    return deployment.desired and current is Phase.SUPERSEDED and wanted not in ENDED


def _log(deployment: Deployment, before: Phase) -> None:
    """What went wrong is for everybody; with many devices the rest fills a log."""
    if deployment.phase != before.value:
        level = logging.INFO if deployment.phase in GONE_BACK else logging.DEBUG
        why = f": {deployment.failure['detail']}" if deployment.failure else ""
        ids = {"rollout": deployment.rollout_id, "deployment": deployment.id, "device": deployment.device_id}
        ids["fleet"] = deployment.fleet_id
        log.log(level, "device %s: deployment %s is %s%s", deployment.device_id, deployment.id, deployment.phase, why,
                extra=ids)  # fmt: skip


def _reaches(current: Phase, wanted: Phase) -> bool:
    """Whether the table leads from one phase to the other, over phases whose reports were coalesced."""
    seen, frontier = {current}, [current]
    while frontier:
        for following in TRANSITIONS[frontier.pop()]:
            if following not in seen:
                seen.add(following)
                frontier.append(following)
    return wanted in seen
