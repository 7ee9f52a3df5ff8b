"""What the server needs to run: leases between replicas, and messages that must be sent."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class Lease(Base):
    """A named job that one server at a time may do."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    owner: Mapped[str]
    until: Mapped[dt.datetime]


class OutboxMessage(Base):
    """A message written with the change that caused it, deleted when the broker has acknowledged it."""

    __tablename__ = "outbox"
    __table_args__ = (Index(None, "topic", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    topic: Mapped[str]
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    retain: Mapped[bool]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class IdempotencyKey(Base):
    """A POST that was, or is being, answered; its answer is sealed by the key itself (`fleet_server.idempotency`)."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index(None, "expires_at"), Index(None, "fleet_id", "principal_id", "created_at"))

    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"), primary_key=True)
    principal_id: Mapped[str] = mapped_column(primary_key=True)
    key_sha256: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]  # SHA-256 over method, path, query and body
    claim: Mapped[str]  # whose it is to answer
    claimed_until: Mapped[dt.datetime]
    status: Mapped[int | None]  # of the answer; None until there is one
    headers: Mapped[dict[str, Any] | None]
    body: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[dt.datetime]
    expires_at: Mapped[dt.datetime]
