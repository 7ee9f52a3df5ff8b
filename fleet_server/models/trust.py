"""The TUF repository of a fleet: metadata as it was signed, and the manifests it is to vouch for."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import ForeignKey, Index, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base


class TrustMetadata(Base):
    """Published metadata: one version of a role, the very bytes that were signed."""

    __tablename__ = "trust_metadata"

    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class TrustTarget(Base):
    """A manifest that is to be signed, or is: which, the published metadata of its role says."""

    __tablename__ = "trust_targets"
    __table_args__ = (Index(None, "fleet_id", "role"),)

    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    manifest: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class TrustProposal(Base):
    """Metadata that waits for signatures, with those that came."""

    __tablename__ = "trust_proposals"

    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
