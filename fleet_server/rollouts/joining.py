"""Devices that come to meet a running rollout's target later: they join at the stage that is open, never past it."""

from __future__ import annotations

import datetime as dt
import logging

from sqlalchemy.orm import Session

from fleet_server.clock import utc_now
from fleet_server.domain.stages import late_stage
from fleet_server.domain.strategy import RolloutStrategy, RolloutTarget
from fleet_server.errors import FleetError
from fleet_server.models import Device, Model, Rollout, Version
from fleet_server.rollouts import repository, service
from fleet_server.rollouts.planning import named, select, variant_for
from fleet_server.rollouts.schemas import Terms

log = logging.getLogger(__name__)
AT_ONCE = 500  # devices that one tick looks at; the next one goes on after them
LOOK_EVERY = dt.timedelta(seconds=10)


def join_late(session: Session, rollout: Rollout) -> int:
    """Add devices that meet the target by now and have a variant; how many did.

    One that another rollout of the model has not settled, or that runs the version already, is left alone.
    """
    target = RolloutTarget.model_validate(rollout.target)
    now = utc_now()
    open_ended = target.late and (target.all or target.profiles or target.tags or target.query)
    if not open_ended or (rollout.joined_at is not None and now - rollout.joined_at < LOOK_EVERY):
        return 0
    fresh = _fresh(session, rollout, target)
    if not fresh:
        return 0
    version = session.get_one(Version, rollout.version_id)
    allow_unproven = Terms.model_validate(rollout.terms).allow_unproven
    strategy = RolloutStrategy.model_validate(rollout.strategy)
    busy = {one.device_id for one in repository.unsettled(session, version.model_id, [one.id for one in fresh])}
    members = repository.member_count(session, rollout.id)
    joined: list[str] = []
    running = repository.desired_on(session, [device.id for device in fresh], version.model_id)
    for device in fresh:
        variant = variant_for(session, version, device, allow_unproven=allow_unproven)
        if variant is None or device.id in busy:
            continue
        total = members + len(joined)
        stage = late_stage(device.id, strategy, rollout.name, present=rollout.stage, total=total)
        current = running.get(device.id, ())
        service.add_deployment(session, rollout, version, device, variant, stage, total, current=current)
        joined.append(device.id)
    session.flush()
    if joined:
        model = session.get_one(Model, version.model_id).name
        service.add_verdict(rollout, "join", f"{named(joined)} came to meet the target of {model}@{version.name}")
    return len(joined)


def _fresh(session: Session, rollout: Rollout, target: RolloutTarget) -> list[Device]:
    """Devices that meet the target and are not in the rollout; none where the target can't be asked any more."""
    outside = repository.outsiders(session, rollout, rollout.joined_after, limit=AT_ONCE)
    if len(outside) < AT_ONCE:
        rollout.joined_at, rollout.joined_after = utc_now(), ""
    else:
        rollout.joined_after = outside[-1]
    wanted = sorted(set(outside) & set(target.devices)) if target.devices else list(outside)
    if not wanted:
        return []
    try:
        return select(session, rollout.fleet_id, target.model_copy(update={"devices": wanted}))
    except FleetError as error:  # such as a profile that was deleted, or a tag that no device has any more
        log.debug("rollout %s takes nobody in: %s", rollout.id, error)
        return []
