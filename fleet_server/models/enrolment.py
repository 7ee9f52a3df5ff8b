"""Who devices are: tokens and requests to enrol, identities, certificates, and devices that are out of order."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, Text
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class EnrolmentToken(Base):
    """What lets a device enrol by itself; its secret is kept as a hash only."""

    __tablename__ = "enrolment_tokens"

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    secret_sha256: Mapped[str] = mapped_column(unique=True)
    device_id: Mapped[str | None]  # the only device it is for
    tags: Mapped[dict[str, Any]] = mapped_column(default=dict)
    uses_left: Mapped[int]
    expires_at: Mapped[dt.datetime]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    created_by: Mapped[str]


class DeviceIdentity(Base):
    """A device id that somebody may hold, from its registration or enrolment on; locked out since `revoked_at`."""

    __tablename__ = "device_identities"
    __table_args__ = (Index(None, "fleet_id", "device_id"), Index(None, "evict"))

    device_id: Mapped[str] = mapped_column(primary_key=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    key_sha256: Mapped[str | None]  # the only key it may first enrol with
    tags: Mapped[dict[str, Any]] = mapped_column(default=dict)  # given to the device when it first reports
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    created_by: Mapped[str]
    revoked_at: Mapped[dt.datetime | None]
    evict: Mapped[bool] = mapped_column(default=False)  # its connection is to be ended
    evicted_at: Mapped[dt.datetime | None]


class DeviceCertificate(Base):
    """A certificate that was issued to a device."""

    __tablename__ = "device_certificates"
    __table_args__ = (
        Index(None, "device_id", "serial"),
        Index(None, "revoked_at"),
        Index(None, "fleet_id", "device_id", "not_after"),
    )

    serial: Mapped[str] = mapped_column(primary_key=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    device_id: Mapped[str] = mapped_column(ForeignKey("device_identities.device_id"))
    key_sha256: Mapped[str]
    pem: Mapped[str] = mapped_column(Text)
    not_before: Mapped[dt.datetime]
    not_after: Mapped[dt.datetime]
    revoked_at: Mapped[dt.datetime | None]


class Enrolment(Base):
    """A device's request for a certificate, and what became of it."""

    __tablename__ = "enrolments"
    __table_args__ = (
        Index(None, "fleet_id", "state", "id"),
        Index(None, "fleet_id", "id"),
        Index(None, "device_id", "key_sha256"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    device_id: Mapped[str]
    key_sha256: Mapped[str]
    csr: Mapped[str] = mapped_column(Text)
    state: Mapped[str]
    reason: Mapped[str]
    address: Mapped[str]
    token_id: Mapped[str | None]
    serial: Mapped[str | None]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    decided_at: Mapped[dt.datetime | None]
    decided_by: Mapped[str | None]


class DeviceConduct(Base):
    """How often a device was out of order: messages that could not be read, and those beyond its share."""

    __tablename__ = "device_conduct"

    device_id: Mapped[str] = mapped_column(primary_key=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    malformed: Mapped[int] = mapped_column(BigInteger, default=0)
    flooded: Mapped[int] = mapped_column(BigInteger, default=0)
    last_at: Mapped[dt.datetime]
    last_detail: Mapped[str]
    alerted_at: Mapped[dt.datetime | None]
