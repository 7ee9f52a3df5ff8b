"""What the server needs to run: leases between replicas, and messages that must be sent."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import ForeignKey, Index, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.db import Base, new_id, utc_now


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
