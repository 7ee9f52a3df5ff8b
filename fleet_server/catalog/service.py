"""Rules of models, versions and variants as records; building variants is `fleet_server.conversions`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.manifest import ModelFormat
from agent.protocol.processing import Processing
from agent.protocol.release import AGENT
from fleet_server import audit
from fleet_server.catalog import repository
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.schemas import (
    SERVER,
    GateSpec,
    GateVerdict,
    JobView,
    ModelView,
    SourceFormView,
    TensorView,
    UploadView,
    VariantState,
    VariantView,
    VersionCreate,
    VersionView,
)
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.errors import ConflictError, InvalidError, NotFoundError
from fleet_server.models import Blob, Model, SourceForm, Variant, Version
from fleet_server.preconditions import Precondition
from fleet_server.principals import Who
from fleet_server.schemas import Failure
from fleet_server.trust import service as trust

UPLOAD_LIFETIME = dt.timedelta(days=1)


@dataclass(frozen=True)
class InspectionRecord:
    """What the check of a version found, as it is stored, and the forms that were made of its weights by format."""

    inputs: list[Any]
    outputs: list[Any]
    inspection: dict[str, Any]
    exported: dict[ModelFormat, UploadView] = field(default_factory=dict)


class Inspector(Protocol):
    """Checks the files of a version before anything of it is written."""

    def inspect(self, wanted: VersionCreate, keep: Callable[[Path], UploadView]) -> InspectionRecord:
        """Check that files load, agree and fit their data.

        Args:
            wanted: names the files.
            keep: takes a form that was made of weights, as if it had been uploaded.

        Raises:
            InvalidError: naming the field at fault and the remedy.
        """
        ...


def add_upload(database: Database, store: ArtifactStore, fleet_id: str, path: Path, *, actor: Who) -> UploadView:
    """Keep an uploaded file's bytes under their digest."""
    digest, size = store.put_file(path)
    with database.write() as session:
        blob = repository.blob(session, fleet_id, digest)
        if blob is None:
            session.add(Blob(fleet_id=fleet_id, digest=digest, size=size))
        else:
            blob.created_at = utc_now()
        subject = f"upload/{digest}"
        audit.record(
            session, fleet_id=fleet_id, actor=actor, action="upload.create", subject=subject, detail={"size": size}
        )
    # Somebody may have thrown the same bytes away between the two steps above; the row now protects them.
    store.put_file(path)
    return UploadView(digest=digest, size=size)


def discard_uploads(database: Database, store: ArtifactStore, fleet_id: str, digests: Iterable[str]) -> None:
    """Throw away uploads that no version or variant of the fleet names; the bytes stay while another fleet has them."""
    for digest in sorted(set(digests)):
        with database.write() as session:
            blob = repository.blob(session, fleet_id, digest)
            if blob is not None and not repository.is_referenced(session, digest, fleet_id):
                session.delete(blob)
                session.flush()
            if not repository.is_kept(session, digest):
                store.delete(digest)


def sweep_uploads(database: Database, store: ArtifactStore, now: dt.datetime) -> None:
    """Throw away uploads of yesterday that nothing names."""
    with database.read() as session:
        stale = [(blob.fleet_id, blob.digest) for blob in repository.stale_blobs(session, now - UPLOAD_LIFETIME)]
    for fleet_id, digest in stale:
        discard_uploads(database, store, fleet_id, [digest])


def create_version(
    database: Database,
    store: ArtifactStore,
    inspector: Inspector,
    *,
    fleet_id: str,
    model_name: str,
    wanted: VersionCreate,
    actor: Who,
) -> VersionView:
    """Check an uploaded version and add it; the same version sent again is answered as it is.

    Raises:
        NotFoundError: for a digest that was not uploaded.
        InvalidError: when the check refuses it; its uploads are thrown away.
        ConflictError: when the name is taken by other content: versions are immutable.
    """
    if model_name == AGENT:
        raise InvalidError(
            "reserved_name", f"model: {AGENT} is the agent itself: push under another name", field="model"
        )
    with database.read() as session:
        existing = _existing(session, fleet_id, model_name, wanted)
        if existing is not None:
            return existing
        _check_uploads(session, fleet_id, wanted)
    data = (wanted.calibration, wanted.evaluation, wanted.training)
    digests = [source.digest for source in wanted.sources] + [digest for digest in data if digest]
    try:
        found = inspector.inspect(wanted, lambda path: add_upload(database, store, fleet_id, path, actor=actor))
    except InvalidError:
        discard_uploads(database, store, fleet_id, digests)
        raise
    with database.write() as session:
        existing = _existing(session, fleet_id, model_name, wanted)
        if existing is not None:
            return existing
        _check_uploads(session, fleet_id, wanted)
        model = repository.model(session, fleet_id, model_name)
        if model is None:
            model = Model(fleet_id=fleet_id, name=model_name)
            session.add(model)
            session.flush()
        version = Version(
            fleet_id=fleet_id,
            model_id=model.id,
            name=wanted.name,
            inputs=found.inputs,
            outputs=found.outputs,
            labels=list(wanted.labels),
            calibration_digest=wanted.calibration,
            evaluation_digest=wanted.evaluation,
            training_digest=wanted.training,
            architecture=wanted.architecture,
            gate=wanted.gate.model_dump(mode="json"),
            processing=msgspec.to_builtins(wanted.processing),
            inspection=found.inspection,
        )
        session.add(version)
        session.flush()
        for source in wanted.sources:
            blob = repository.blob(session, fleet_id, source.digest)
            size = blob.size if blob else 0
            session.add(
                SourceForm(
                    fleet_id=fleet_id,
                    version_id=version.id,
                    format=source.format.value,
                    digest=source.digest,
                    size=size,
                )
            )
        for form, made in found.exported.items():
            session.add(
                SourceForm(
                    fleet_id=fleet_id,
                    version_id=version.id,
                    format=form.value,
                    digest=made.digest,
                    size=made.size,
                    exported=True,
                )
            )
        session.flush()
        reference = f"{model_name}@{wanted.name}"
        audit.record(
            session,
            fleet_id=fleet_id,
            actor=actor,
            action="version.create",
            subject=f"version/{reference}",
            after=wanted.model_dump(mode="json"),
        )
        return version_view(session, model, version)


def delete_version(
    database: Database,
    store: ArtifactStore,
    *,
    fleet_id: str,
    model_name: str,
    name: str,
    actor: Who,
    unchanged: Precondition,
) -> None:
    """Remove a version that was never rolled out: its variants, its files, and its model when it was the last.

    Raises:
        NotFoundError: when it is not there.
        ConflictError: when a rollout names it, or a device measures it.
        PreconditionFailedError: when it is not as `unchanged` asks.
    """
    with database.write() as session:
        model, version = get_version(session, fleet_id, model_name, name)
        unchanged.check(session, version, lambda: version_view(session, model, version))
        if repository.is_rolled_out(session, version.id):
            raise ConflictError(
                "version_in_use", f"{model_name}@{name} was rolled out, and rollouts keep their history: it stays"
            )
        plan = repository.shard_plan_of(session, version.id)
        if plan is not None:
            detail = f"shard plan {plan} cuts {model_name}@{name}: delete that first (`shoal model unshard`)"
            raise ConflictError("version_in_use", detail)
        running = repository.open_gate_run(session, repository.variant_ids(session, version.id))
        if running is not None:
            raise ConflictError(
                "gate_running", f"gate run {running} measures it: cancel it first (`shoal gate cancel`)"
            )
        trust.forget(session, fleet_id, repository.variant_ids(session, version.id))
        digests = repository.delete_version(session, version)
        if repository.latest_version(session, model.id) is None:
            session.delete(model)
        subject = f"version/{model_name}@{name}"
        audit.record(session, fleet_id=fleet_id, actor=actor, action="version.delete", subject=subject)
    discard_uploads(database, store, fleet_id, digests)


def get_model(session: Session, fleet_id: str, name: str) -> Model:
    """One model.

    Raises:
        NotFoundError: when there is none of that name.
    """
    model = repository.model(session, fleet_id, name)
    if model is None:
        raise NotFoundError("model", name, remedy="list them with `shoal model list`")
    return model


def get_version(session: Session, fleet_id: str, model_name: str, name: str) -> tuple[Model, Version]:
    """One version with its model.

    Raises:
        NotFoundError: when either is not there.
    """
    model = get_model(session, fleet_id, model_name)
    version = repository.version(session, model.id, name)
    if version is None:
        latest = repository.latest_version(session, model.id)
        remedy = f"the newest is {model_name}@{latest.name}" if latest else "push one with `shoal model push`"
        raise NotFoundError("version", f"{model_name}@{name}", remedy=remedy)
    return model, version


def resolve_version(session: Session, fleet_id: str, reference: str) -> Version:
    """The version that `model@version` names.

    Raises:
        InvalidError: when it is not written so.
        NotFoundError: when it is not there.
    """
    model_name, _, name = reference.partition("@")
    if not model_name or not name:
        raise InvalidError("bad_version", f"version: {reference!r} is not `model@version`", field="version")
    return get_version(session, fleet_id, model_name, name)[1]


def ready_variant(session: Session, version_id: str, profile_id: str) -> Variant | None:
    """The variant of a version for a profile that the gate let pass, if there is one."""
    variant = repository.variant_of(session, version_id, profile_id)
    return variant if variant is not None and variant.state == VariantState.READY else None


def is_proven(variant: Variant) -> bool:
    """Whether the gate let it pass on a device of its profile."""
    ready = variant.state == VariantState.READY and variant.gate is not None
    return ready and GateVerdict.model_validate(variant.gate).measured_on != SERVER


def get_variant(session: Session, fleet_id: str, variant_id: str) -> VariantView:
    """One variant.

    Raises:
        NotFoundError: when it is not there.
    """
    row = repository.variant_row(session, fleet_id, variant_id)
    if row is None:
        raise NotFoundError("variant", variant_id, remedy="list them with `shoal variant list`")
    return variant_view(session, row)


def model_view(session: Session, model: Model) -> ModelView:
    """The HTTP shape of a model."""
    latest = repository.latest_version(session, model.id)
    return ModelView(
        id=model.id, name=model.name, latest_version=latest.name if latest else None, created_at=model.created_at
    )


def version_view(session: Session, model: Model, version: Version) -> VersionView:
    """The HTTP shape of a version."""
    forms = repository.source_forms(session, version.id)
    return VersionView(
        id=version.id,
        model=model.name,
        name=version.name,
        reference=f"{model.name}@{version.name}",
        sources=[SourceFormView.model_validate(form) for form in forms],
        inputs=[TensorView.model_validate(tensor) for tensor in version.inputs],
        outputs=[TensorView.model_validate(tensor) for tensor in version.outputs],
        labels=version.labels,
        architecture=version.architecture,
        calibration=version.calibration_digest,
        evaluation=version.evaluation_digest,
        training=version.training_digest,
        gate=GateSpec.model_validate(version.gate),
        processing=version.processing,
        inspection=version.inspection,
        created_at=version.created_at,
    )


def variant_view(session: Session, row: repository.VariantRow) -> VariantView:
    """The HTTP shape of a variant."""
    variant, model, version, profile = row
    job = repository.latest_job(session, variant.id)
    return VariantView(
        id=variant.id,
        model=model.name,
        version=version.name,
        profile=profile.name,
        state=VariantState(variant.state),
        runtime=variant.profile_spec["runtime"],
        precision=variant.precision,
        digest=variant.digest,
        size=variant.size,
        measurements=variant.measurements,
        candidates=variant.candidates,
        lineage=variant.lineage,
        gate=GateVerdict.model_validate(variant.gate) if variant.gate else None,
        proven=is_proven(variant),
        failure=Failure.model_validate(variant.failure) if variant.failure else None,
        job=JobView.model_validate(job) if job else None,
        created_at=variant.created_at,
        updated_at=variant.updated_at,
    )


def _existing(session: Session, fleet_id: str, model_name: str, wanted: VersionCreate) -> VersionView | None:
    model = repository.model(session, fleet_id, model_name)
    version = repository.version(session, model.id, wanted.name) if model else None
    if model is None or version is None:
        return None
    forms = {(one.format, one.digest) for one in repository.source_forms(session, version.id) if not one.exported}
    same = (
        forms == {(source.format.value, source.digest) for source in wanted.sources}
        and version.calibration_digest == wanted.calibration
        and version.evaluation_digest == wanted.evaluation
        and version.training_digest == wanted.training
        and version.architecture == wanted.architecture
        and version.labels == list(wanted.labels)
        and version.gate == wanted.gate.model_dump(mode="json")
        and processing_of(version) == wanted.processing
    )
    if not same:
        raise ConflictError(
            "version_exists",
            f"{model_name}@{wanted.name} is there already with other content, and versions are immutable: "
            "push under another version name",
        )
    return version_view(session, model, version)


def processing_of(version: Version) -> Processing | None:
    """What a version declares of images and answers."""
    return None if version.processing is None else msgspec.convert(version.processing, Processing)


def _check_uploads(session: Session, fleet_id: str, wanted: VersionCreate) -> None:
    formats = [source.format for source in wanted.sources]
    if len(set(formats)) != len(formats):
        raise InvalidError("duplicate_format", "sources: a version holds one file a format", field="sources")
    named = [(f"sources.{i}.digest", source.digest) for i, source in enumerate(wanted.sources)]
    named += [(name, getattr(wanted, name) or "") for name in ("calibration", "evaluation", "training")]
    for place, digest in named:
        if digest and repository.blob(session, fleet_id, digest) is None:
            raise InvalidError(
                "upload_not_found",
                f"{place}: {digest[:12]}… was not uploaded, or is gone: upload it first",
                field=place,
            )
