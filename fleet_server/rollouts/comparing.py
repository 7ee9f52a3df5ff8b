"""A rollout's cohort beside the version before, by profile: reads telemetry, and changes nothing."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict

from sqlalchemy.orm import Session

from fleet_server.domain.comparison import Estimate, compared
from fleet_server.domain.evidence import Sample
from fleet_server.models import Rollout
from fleet_server.rollouts import repository
from fleet_server.rollouts.evidence import BEFORE, sample
from fleet_server.rollouts.schemas import CohortComparison, ComparedFigure, Figure, RolloutComparison

DEVICES = 200  # of a rollout whose windows are read


def compare(session: Session, rollout: Rollout) -> RolloutComparison:
    """What devices of a rollout did with its version, and with the one before: from an hour before they were sent it.

    Where both run side by side (`exposure`), what the one before did in that time counts too.
    """
    now: dict[str, Sample] = defaultdict(Sample)
    before: dict[str, Sample] = defaultdict(Sample)
    devices: dict[str, int] = defaultdict(int)
    cohort = repository.cohort(session, rollout.id, limit=DEVICES)
    profiles, since, running = {}, {}, {}
    for deployment, profile in cohort:
        devices[profile] += 1
        for deployment_id in filter(None, (deployment.id, deployment.previous_id)):
            profiles[deployment_id], running[deployment_id] = profile, deployment.device_id
            since[deployment_id] = (deployment.sent_at or rollout.created_at) - BEFORE
    ours = {deployment.id for deployment, _ in cohort}
    first = min(since.values(), default=rollout.created_at)
    for deployment_id, window in repository.windows_of(session, running, first):
        if window.ended_at >= since[deployment_id]:
            (now if deployment_id in ours else before)[profiles[deployment_id]] += sample(window)
    return RolloutComparison(
        id=rollout.id,
        cohorts=[
            CohortComparison(
                profile=profile,
                devices=devices[profile],
                requests=now[profile].requests,
                requests_before=before[profile].requests,
                figures=[
                    ComparedFigure(name=name, now=_figure(found), before=_figure(reference))
                    for name, found, reference in compared(now[profile], before[profile])
                ],
            )
            for profile in sorted(devices)
        ],
        until=dt.datetime.now(dt.UTC),
    )


def _figure(found: Estimate | None) -> Figure | None:
    return None if found is None else Figure(value=found.value, low=found.low, high=found.high)
