"""Every query over encodings and what devices hold."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, exists, func, select
from sqlalchemy.orm import Session, aliased

from fleet_server.db import rows_by
from fleet_server.models import ArtifactEncoding, Deployment, DeviceHolding, Rollout, Variant, Version

SETTLED_PHASES = ("active", "failed", "rolled_back", "superseded")
MOST_BASES = 8  # that differences of one artifact are made to
OPEN_STATES = ("running", "paused", "reverting")
Before = aliased(Variant)
BeforeVersion = aliased(Version)


def of_artifacts(session: Session, fleet_id: str, artifacts: Collection[str]) -> Sequence[ArtifactEncoding]:
    """Encodings of artifacts, the smallest first."""
    query = select(ArtifactEncoding).where(
        ArtifactEncoding.fleet_id == fleet_id,
        ArtifactEncoding.artifact.in_(artifacts),
        ArtifactEncoding.digest != "",
    )
    return session.scalars(query.order_by(ArtifactEncoding.size)).all()


def holders(session: Session, digests: Collection[str], device_ids: Sequence[str]) -> set[tuple[str, str]]:
    """Which of these devices hold which of these digests: device and digest."""
    query = select(DeviceHolding.device_id, DeviceHolding.digest).where(DeviceHolding.digest.in_(digests))
    return {(row[0], row[1]) for row in rows_by(session, query, DeviceHolding.device_id, device_ids)}


def entitled_size(session: Session, device_id: str, digest: str) -> int | None:
    """Bytes of an encoding, when it makes what the device ought to run; None otherwise."""
    query = (
        select(ArtifactEncoding.size)
        .join(Variant, Variant.digest == ArtifactEncoding.artifact)
        .join(Deployment, Deployment.variant_id == Variant.id)
        .where(
            ArtifactEncoding.digest == digest,
            ArtifactEncoding.fleet_id == Deployment.fleet_id,
            Deployment.device_id == device_id,
            Deployment.desired.is_(True),
        )
    )
    return session.scalar(query.limit(1))


def missing_differences(session: Session, least: int, limit: int) -> list[tuple[str, str, str]]:
    """Fleet, artifact and base of differences that open rollouts' devices could use, and nobody has made yet."""
    query = _differences(select(Deployment.fleet_id, Variant.digest, DeviceHolding.digest).distinct(), least)
    return [(row[0], row[1], row[2]) for row in session.execute(query.limit(limit))]


def missing_full(session: Session, least: int, limit: int) -> list[tuple[str, str, str]]:
    """Fleet and artifact of what open rollouts send and nobody has compressed yet, with an empty base."""
    made = exists().where(
        ArtifactEncoding.fleet_id == Deployment.fleet_id,
        ArtifactEncoding.artifact == Variant.digest,
        ArtifactEncoding.base == "",
    )
    query = (
        select(Deployment.fleet_id, Variant.digest)
        .distinct()
        .select_from(Deployment)
        .join(Rollout, Rollout.id == Deployment.rollout_id)
        .join(Variant, Variant.id == Deployment.variant_id)
        .where(Rollout.state.in_(OPEN_STATES), Deployment.phase.not_in(SETTLED_PHASES), Variant.size >= least, ~made)
        .limit(limit)
    )
    return [(row[0], row[1] or "", "") for row in session.execute(query)]


def awaiting(session: Session, rollout_id: str, stage: int, least: int) -> set[str]:
    """Deployments of a rollout, not sent yet, for which a difference is still to be made."""
    query = _differences(select(Deployment.id).distinct(), least).where(
        Deployment.rollout_id == rollout_id, Deployment.phase == "scheduled", Deployment.stage <= stage
    )
    return set(session.scalars(query))


def _few_enough() -> ColumnElement[bool]:
    """Devices say themselves what they hold: an artifact gets differences to so many others, and no more."""
    made = aliased(ArtifactEncoding)
    count = (
        select(func.count())
        .select_from(made)
        .where(made.fleet_id == Deployment.fleet_id, made.artifact == Variant.digest, made.base != "")
    )
    return count.correlate(Deployment, Variant).scalar_subquery() < MOST_BASES


def _differences(columns: Any, least: int) -> Select[Any]:
    """Unsettled deployments beside other versions of their model that their devices hold, where no row says more."""
    made = exists().where(
        ArtifactEncoding.fleet_id == Deployment.fleet_id,
        ArtifactEncoding.artifact == Variant.digest,
        ArtifactEncoding.base == DeviceHolding.digest,
    )
    query: Select[Any] = (
        columns.select_from(Deployment)
        .join(Rollout, Rollout.id == Deployment.rollout_id)
        .join(Variant, Variant.id == Deployment.variant_id)
        .join(DeviceHolding, DeviceHolding.device_id == Deployment.device_id)
        .join(Before, and_(Before.digest == DeviceHolding.digest, Before.fleet_id == Deployment.fleet_id))
        .join(BeforeVersion, BeforeVersion.id == Before.version_id)
        .where(
            Rollout.state.in_(OPEN_STATES),
            Deployment.phase.not_in(SETTLED_PHASES),
            BeforeVersion.model_id == Deployment.model_id,
            DeviceHolding.digest != Variant.digest,
            Variant.size >= least,
            ~made,
            _few_enough(),
        )
    )
    return query


def find(session: Session, fleet_id: str, artifact: str, base: str) -> ArtifactEncoding | None:
    """What is known of a pair."""
    return session.scalar(
        select(ArtifactEncoding).where(
            ArtifactEncoding.fleet_id == fleet_id,
            ArtifactEncoding.artifact == artifact,
            ArtifactEncoding.base == base,
        )
    )


def orphans(session: Session) -> Sequence[ArtifactEncoding]:
    """Encodings whose artifact or base no variant has any more."""
    artifact = exists().where(
        Variant.digest == ArtifactEncoding.artifact, Variant.fleet_id == ArtifactEncoding.fleet_id
    )
    base = exists().where(Variant.digest == ArtifactEncoding.base, Variant.fleet_id == ArtifactEncoding.fleet_id)
    return session.scalars(select(ArtifactEncoding).where(~artifact | (~base & (ArtifactEncoding.base != "")))).all()


def is_named(session: Session, digest: str) -> bool:
    """Whether any encoding has these bytes."""
    return session.scalar(select(ArtifactEncoding.id).where(ArtifactEncoding.digest == digest).limit(1)) is not None


def remove(session: Session, ids: Sequence[str]) -> None:
    """Forget encodings."""
    session.execute(delete(ArtifactEncoding).where(ArtifactEncoding.id.in_(ids)))
