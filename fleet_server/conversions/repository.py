"""Every query over conversion jobs."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session, aliased

from fleet_server.db import question, rows_by
from fleet_server.models import ConversionJob, Deployment, GateRun, GateTrial, Variant, Version

HAS_WORK = question(select(ConversionJob.id).where(ConversionJob.state.in_(("queued", "running"))))


def next_job(session: Session, now: dt.datetime) -> ConversionJob | None:
    """The oldest job that may run, or whose runner went silent; locked for this transaction.

    One whose work another one does now waits for it.
    """
    other = aliased(ConversionJob)
    same = select(other.id).where(other.work == ConversionJob.work, other.state == "running", other.lease_until >= now)
    ready = and_(ConversionJob.state == "queued", or_(ConversionJob.retry_at.is_(None), ConversionJob.retry_at <= now))
    lost = and_(ConversionJob.state == "running", ConversionJob.lease_until < now)
    query = (
        select(ConversionJob)
        .where(or_(ready, lost), ~same.exists())
        .order_by(ConversionJob.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    return session.scalar(query)


def is_done_by_another(session: Session, job: ConversionJob, now: dt.datetime) -> bool:
    """Whether somebody else does a job's work, or is about to; nobody can be until this transaction ends.

    On PostgreSQL two transactions may have picked jobs of one work at once, and see only what is committed.
    """
    if job.work is None or session.get_bind().dialect.name != "postgresql":
        return False
    if not session.scalar(select(func.pg_try_advisory_xact_lock(int(job.work[:15], 16)))):
        return True
    same = select(ConversionJob.id).where(
        ConversionJob.work == job.work,
        ConversionJob.id != job.id,
        ConversionJob.state == "running",
        ConversionJob.lease_until >= now,
    )
    return session.scalar(same.limit(1)) is not None


def open_job(session: Session, variant_id: str) -> ConversionJob | None:
    """The job of a variant that waits or runs; locked for this transaction."""
    query = (
        select(ConversionJob)
        .where(ConversionJob.variant_id == variant_id, ConversionJob.state.in_(("queued", "running")))
        .order_by(ConversionJob.id.desc())
        .limit(1)
        .with_for_update()
    )
    return session.scalar(query)


def baseline_variant(session: Session, version: Version, profile_id: str) -> tuple[Variant, Version] | None:
    """The variant the newest earlier version with a ready one has for a profile; one that was deployed comes first."""
    query = (
        select(Variant, Version)
        .join(Version, Version.id == Variant.version_id)
        .where(
            Version.model_id == version.model_id,
            Version.id < version.id,
            Variant.profile_id == profile_id,
            Variant.state == "ready",
        )
        .order_by(Version.id.desc())
    )
    deployed = select(Deployment.id).where(Deployment.variant_id == Variant.id, Deployment.phase == "active")
    row = session.execute(query.where(deployed.exists()).limit(1)).first() or session.execute(query.limit(1)).first()
    return None if row is None else (row[0], row[1])


def is_deployed(session: Session, variant_id: str) -> bool:
    """Whether a deployment names the variant."""
    return session.scalar(select(Deployment.id).where(Deployment.variant_id == variant_id).limit(1)) is not None


def open_trials(session: Session, device_ids: Sequence[str]) -> dict[str, list[tuple[GateTrial, GateRun]]]:
    """What devices are to measure for gate runs that are not over, oldest first, by device."""
    found: dict[str, list[tuple[GateTrial, GateRun]]] = defaultdict(list)
    query = (
        select(GateTrial, GateRun)
        .join(GateRun, GateRun.id == GateTrial.run_id)
        .where(GateTrial.phase.not_in(("done", "failed")), GateRun.state == "running")
        .order_by(GateTrial.id)
    )
    for trial, run in rows_by(session, query, GateTrial.device_id, device_ids):
        found[trial.device_id].append((trial, run))
    return found
