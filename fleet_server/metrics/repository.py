"""How much there is of everything: a few grouped counts, none of which grows with what is over and done with."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fleet_server.domain.states import RolloutState
from fleet_server.models import ConversionJob, Deployment, Device, OutboxMessage, Rollout, WebhookDelivery

ENDED = (RolloutState.SUCCEEDED, RolloutState.STOPPED, RolloutState.REVERTED)
OPEN_JOBS = ("queued", "running")
OPEN_DELIVERIES = ("pending", "dead")


@dataclass(frozen=True)
class Census:
    """How much there was of everything at one moment.

    Attributes:
        devices: by fleet and whether they are online.
        rollouts: by fleet and state.
        deployments: of rollouts that have not ended, by fleet and phase.
        conversions: jobs that wait or run, by state.
        deliveries: of webhooks that wait or were given up, by state.
        outbox: messages that the broker has not acknowledged.
        outbox_since: when the oldest of them was written.
    """

    devices: dict[tuple[str, bool], int]
    rollouts: dict[tuple[str, str], int]
    deployments: dict[tuple[str, str], int]
    conversions: dict[str, int]
    deliveries: dict[str, int]
    outbox: int
    outbox_since: dt.datetime | None


def census(session: Session) -> Census:
    """Count everything."""
    devices = select(Device.fleet_id, Device.online, func.count()).where(Device.forgotten_at.is_(None))
    rollouts = select(Rollout.fleet_id, Rollout.state, func.count()).group_by(Rollout.fleet_id, Rollout.state)
    states = [one.value for one in RolloutState if one not in ENDED]
    of_open = select(Rollout.id).where(Rollout.state.in_(states))
    deployments = (
        select(Rollout.fleet_id, Deployment.phase, func.count())
        .join(Rollout, Rollout.id == Deployment.rollout_id)
        .where(Deployment.rollout_id.in_(of_open))
        .group_by(Rollout.fleet_id, Deployment.phase)
    )
    jobs = select(ConversionJob.state, func.count()).where(ConversionJob.state.in_(OPEN_JOBS))
    deliveries = select(WebhookDelivery.state, func.count()).where(WebhookDelivery.state.in_(OPEN_DELIVERIES))
    waiting = session.scalar(select(func.count()).select_from(OutboxMessage)) or 0
    oldest = select(OutboxMessage.created_at).order_by(OutboxMessage.id).limit(1)  # ids sort as they were made
    return Census(
        devices={(one[0], one[1]): one[2] for one in session.execute(devices.group_by(Device.fleet_id, Device.online))},
        rollouts={(one[0], one[1]): one[2] for one in session.execute(rollouts)},
        deployments={(one[0], one[1]): one[2] for one in session.execute(deployments)},
        conversions={one[0]: one[1] for one in session.execute(jobs.group_by(ConversionJob.state))},
        deliveries={one[0]: one[1] for one in session.execute(deliveries.group_by(WebhookDelivery.state))},
        outbox=waiting,
        outbox_since=session.scalar(oldest),
    )
