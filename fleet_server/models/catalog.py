"""Models, their versions and the variants built of them."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint, false
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class Blob(Base):
    """Bytes in the artifact store, by their SHA-256: uploads, source forms, data sets, artifacts."""

    __tablename__ = "blobs"
    __table_args__ = (Index(None, "fleet_id", "created_at"),)

    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class Model(Base):
    """A named model; or the agent, whose releases are versions of it (`kind`: `model` or `agent`)."""

    __tablename__ = "models"
    __table_args__ = (UniqueConstraint("fleet_id", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    name: Mapped[str]
    kind: Mapped[str] = mapped_column(default="model", server_default="model")
    description: Mapped[str] = mapped_column(default="")
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class Version(Base):
    """An immutable version of a model: its tensors, its data sets; its files are in `source_forms`."""

    __tablename__ = "versions"
    __table_args__ = (UniqueConstraint("model_id", "name"), Index(None, "fleet_id", "id"))

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    name: Mapped[str]
    inputs: Mapped[list[Any]]  # TensorSpec, as JSON
    outputs: Mapped[list[Any]]
    labels: Mapped[list[Any]] = mapped_column(default=list)
    calibration_digest: Mapped[str | None]
    evaluation_digest: Mapped[str | None]
    training_digest: Mapped[str | None]
    architecture: Mapped[str | None]  # of safetensors: the registered net that takes them
    processing: Mapped[dict[str, Any] | None]  # agent.protocol.processing.Processing, as JSON
    gate: Mapped[dict[str, Any]] = mapped_column(default=dict)  # GateSpec, as JSON
    inspection: Mapped[dict[str, Any]] = mapped_column(default=dict)  # what the check at upload found
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class SourceForm(Base):
    """One file of a version: the same net in one format; `exported` where the server made it of weights."""

    __tablename__ = "source_forms"
    __table_args__ = (UniqueConstraint("version_id", "format"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    version_id: Mapped[str] = mapped_column(ForeignKey("versions.id"))
    format: Mapped[str]
    digest: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    exported: Mapped[bool] = mapped_column(default=False, server_default=false())


class Variant(Base):
    """One version converted for one profile, as the profile was when the build was asked for.

    `state` is `fleet_server.catalog.schemas.VariantState`.
    """

    __tablename__ = "variants"
    __table_args__ = (
        UniqueConstraint("version_id", "profile_id"),
        Index(None, "fleet_id", "id"),
        Index(None, "fleet_id", "state", "id"),
        Index(None, "digest"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    version_id: Mapped[str] = mapped_column(ForeignKey("versions.id"))
    profile_id: Mapped[str] = mapped_column(ForeignKey("profiles.id"))
    profile_spec: Mapped[dict[str, Any]]
    state: Mapped[str]
    precision: Mapped[str | None]
    digest: Mapped[str | None]
    size: Mapped[int | None] = mapped_column(BigInteger)
    manifest: Mapped[dict[str, Any] | None]  # agent.protocol.manifest.Manifest, as JSON
    measurements: Mapped[dict[str, Any] | None]  # converters.job.Measurements of the chosen candidate
    candidates: Mapped[list[Any]] = mapped_column(default=list)  # converters.job.Candidate, all that were tried
    lineage: Mapped[dict[str, Any] | None]
    gate: Mapped[dict[str, Any] | None]  # GateVerdict, as JSON
    failure: Mapped[dict[str, Any] | None]  # {"code", "detail"}
    judged_against: Mapped[dict[str, Any] | None]  # fleet_server.conversions.gate.References, as JSON
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[dt.datetime] = mapped_column(default=utc_now, onupdate=utc_now)

    @property
    def is_release(self) -> bool:
        """Whether it is a bundle of a release of the agent: its manifest is an `agent.protocol.release` one."""
        return "platform" in self.profile_spec


class CandidateArtifact(Base):
    """Bytes of a candidate that a gate run may send to devices; kept until the variant is built again or removed."""

    __tablename__ = "candidate_artifacts"
    __table_args__ = (Index(None, "digest"),)

    variant_id: Mapped[str] = mapped_column(ForeignKey("variants.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(primary_key=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
