"""What devices hold, and the encodings that artifacts may travel by."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class DeviceHolding(Base):
    """One artifact that a device says it has whole."""

    __tablename__ = "device_holdings"
    __table_args__ = (Index(None, "digest"),)

    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(primary_key=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))


class ArtifactEncoding(Base):
    """The best encoding of an artifact for devices that hold `base`; without `digest` there is none worth sending."""

    __tablename__ = "encodings"
    __table_args__ = (UniqueConstraint("fleet_id", "artifact", "base"), Index(None, "digest"))

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    artifact: Mapped[str]  # digest of what it makes
    base: Mapped[str] = mapped_column(default="")  # digest of what it needs; empty when nothing
    codec: Mapped[str] = mapped_column(default="")  # agent.protocol.delta
    digest: Mapped[str] = mapped_column(default="")  # of what travels
    size: Mapped[int] = mapped_column(BigInteger, default=0)  # bytes that travel
    detail: Mapped[str] = mapped_column(default="")  # how it was found, or why there is none
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
