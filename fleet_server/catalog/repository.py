"""Every query over models, versions, source forms, variants and blobs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from sqlalchemy import Select, delete, or_, select
from sqlalchemy.orm import Session

from fleet_server.models import (
    Blob,
    CandidateArtifact,
    ConversionJob,
    Deployment,
    GateRun,
    GateTrial,
    Model,
    Profile,
    Rollout,
    ShardPlan,
    SourceForm,
    Variant,
    Version,
)
from fleet_server.paging import PageRequest, Rows, TableList

VariantRow = tuple[Variant, Model, Version, Profile]
MODELS = TableList(
    Model.id, {"name": Model.name, "created_at": Model.id}, default="name", name=Model.name, time=Model.created_at
)
VERSIONS = TableList(
    Version.id,
    {"created_at": Version.id, "name": Version.name},
    default="-created_at",
    name=Version.name,
    time=Version.created_at,
)
VARIANTS = TableList(
    Variant.id,
    {
        "created_at": Variant.id,
        "updated_at": Variant.updated_at,
        "state": Variant.state,
        "model": Model.name,
        "profile": Profile.name,
    },
    default="-created_at",
    time=Variant.created_at,
)


def blob(session: Session, fleet_id: str, digest: str) -> Blob | None:
    """An upload."""
    return session.get(Blob, (fleet_id, digest))


def stale_blobs(session: Session, before: dt.datetime) -> Sequence[Blob]:
    """Blobs that were there before a time."""
    return session.scalars(select(Blob).where(Blob.created_at < before)).all()


def is_referenced(session: Session, digest: str, fleet_id: str | None = None) -> bool:
    """Whether any version or variant, of a fleet where one is given, names the digest."""
    data = or_(
        Version.calibration_digest == digest, Version.evaluation_digest == digest, Version.training_digest == digest
    )
    queries = (
        (select(SourceForm.id).where(SourceForm.digest == digest), SourceForm.fleet_id),
        (select(Version.id).where(data), Version.fleet_id),
        (select(Variant.id).where(Variant.digest == digest), Variant.fleet_id),
        (select(CandidateArtifact.variant_id).where(CandidateArtifact.digest == digest), CandidateArtifact.fleet_id),
    )
    return any(
        session.scalar((query if fleet_id is None else query.where(column == fleet_id)).limit(1)) is not None
        for query, column in queries
    )


def is_kept(session: Session, digest: str) -> bool:
    """Whether the bytes have an owner in any fleet: what names them, or an upload that something may yet name."""
    uploaded = select(Blob.digest).where(Blob.digest == digest).limit(1)
    return session.scalar(uploaded) is not None or is_referenced(session, digest)


def model(session: Session, fleet_id: str, name: str) -> Model | None:
    """A model by name."""
    return session.scalar(_models(fleet_id).where(Model.name == name))


def models_page(session: Session, fleet_id: str, request: PageRequest) -> Rows[Model]:
    """A page of models."""
    return MODELS.scalars(session, _models(fleet_id), request)


def _models(fleet_id: str) -> Select[Model]:
    """Models: the agent is none."""
    return select(Model).where(Model.fleet_id == fleet_id, Model.kind == "model")


def version(session: Session, model_id: str, name: str) -> Version | None:
    """A version by name."""
    return session.scalar(select(Version).where(Version.model_id == model_id, Version.name == name))


def latest_version(session: Session, model_id: str) -> Version | None:
    """The newest version of a model."""
    return session.scalar(select(Version).where(Version.model_id == model_id).order_by(Version.id.desc()).limit(1))


def versions_page(session: Session, model_id: str, request: PageRequest) -> Rows[Version]:
    """A page of a model's versions."""
    return VERSIONS.scalars(session, select(Version).where(Version.model_id == model_id), request)


def source_forms(session: Session, version_id: str) -> Sequence[SourceForm]:
    """The files of a version."""
    return session.scalars(
        select(SourceForm).where(SourceForm.version_id == version_id).order_by(SourceForm.format)
    ).all()


def variant_row(session: Session, fleet_id: str, variant_id: str) -> VariantRow | None:
    """A variant with its model, version and profile."""
    row = session.execute(_variants(fleet_id).where(Variant.id == variant_id)).first()
    return None if row is None else (row[0], row[1], row[2], row[3])


def variants_page(
    session: Session,
    fleet_id: str,
    request: PageRequest,
    *,
    version_id: str | None,
    profile: str | None,
    state: str | None,
) -> Rows[VariantRow]:
    """A page of variants."""
    query = _variants(fleet_id)
    if version_id is not None:
        query = query.where(Variant.version_id == version_id)
    if profile is not None:
        query = query.where(Profile.name == profile)
    if state is not None:
        query = query.where(Variant.state == state)
    return VARIANTS.rows(session, query, request)


def variant_ids(session: Session, version_id: str) -> Sequence[str]:
    """Ids of a version's variants."""
    return session.scalars(select(Variant.id).where(Variant.version_id == version_id)).all()


def variant_of(session: Session, version_id: str, profile_id: str) -> Variant | None:
    """The variant of a version for a profile."""
    return session.scalar(select(Variant).where(Variant.version_id == version_id, Variant.profile_id == profile_id))


def candidate_digests(session: Session, variant_id: str) -> set[str]:
    """Artifacts of a variant's candidates that are kept for gate runs."""
    query = select(CandidateArtifact.digest).where(CandidateArtifact.variant_id == variant_id)
    return set(session.scalars(query))


def keep_candidates(session: Session, variant: Variant, digests: set[str]) -> None:
    """Note which artifacts of a variant's candidates are kept; those of its build before are not any more."""
    session.execute(delete(CandidateArtifact).where(CandidateArtifact.variant_id == variant.id))
    session.add_all(
        CandidateArtifact(variant_id=variant.id, digest=one, fleet_id=variant.fleet_id) for one in sorted(digests)
    )
    session.flush()


def latest_job(session: Session, variant_id: str) -> ConversionJob | None:
    """The newest job of a variant."""
    query = select(ConversionJob).where(ConversionJob.variant_id == variant_id).order_by(ConversionJob.id.desc())
    return session.scalar(query.limit(1))


def shard_plan_of(session: Session, version_id: str) -> str | None:
    """The id of a shard plan of a version, if there is one."""
    return session.scalar(select(ShardPlan.id).where(ShardPlan.version_id == version_id).limit(1))


def is_rolled_out(session: Session, version_id: str) -> bool:
    """Whether a rollout or a deployment names a version."""
    queries = (
        select(Rollout.id).where(Rollout.version_id == version_id),
        select(Deployment.id).where(Deployment.version_id == version_id),
    )
    return any(session.scalar(query.limit(1)) is not None for query in queries)


def open_gate_run(session: Session, variant_ids: Sequence[str]) -> str | None:
    """A gate run that measures one of these variants now."""
    running = select(GateRun.id).where(GateRun.variant_id.in_(variant_ids), GateRun.state == "running")
    return session.scalar(running.limit(1))


def delete_version(session: Session, version: Version) -> set[str]:
    """Remove a version with its variants and their jobs; returns the digests they named."""
    variants = select(Variant.id).where(Variant.version_id == version.id)
    digests = [
        *session.scalars(select(SourceForm.digest).where(SourceForm.version_id == version.id)),
        *session.scalars(select(Variant.digest).where(Variant.version_id == version.id)),
        *session.scalars(select(CandidateArtifact.digest).where(CandidateArtifact.variant_id.in_(variants))),
        version.calibration_digest,
        version.evaluation_digest,
        version.training_digest,
    ]
    runs = select(GateRun.id).where(GateRun.variant_id.in_(variants))
    session.execute(delete(GateTrial).where(GateTrial.run_id.in_(runs)))
    session.execute(delete(GateRun).where(GateRun.variant_id.in_(variants)))
    session.execute(delete(CandidateArtifact).where(CandidateArtifact.variant_id.in_(variants)))
    session.execute(delete(ConversionJob).where(ConversionJob.variant_id.in_(variants)))
    session.execute(delete(Variant).where(Variant.version_id == version.id))
    session.execute(delete(SourceForm).where(SourceForm.version_id == version.id))
    session.delete(version)
    session.flush()
    return {digest for digest in digests if digest}


def _variants(fleet_id: str) -> Select[Variant, Model, Version, Profile]:
    return (
        select(Variant, Model, Version, Profile)
        .join(Version, Version.id == Variant.version_id)
        .join(Model, Model.id == Version.model_id)
        .join(Profile, Profile.id == Variant.profile_id)
        .where(Variant.fleet_id == fleet_id, Model.kind == "model")
    )
