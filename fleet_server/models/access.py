"""Fleets and what was done in them."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.db import Base, new_id, utc_now

DEFAULT_FLEET = "default"


class Fleet(Base):
    """A set of devices with its models; the unit that will become a tenant."""

    __tablename__ = "fleets"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class AuditEvent(Base):
    """One thing that somebody, or the server by itself, did. Only ever added."""

    __tablename__ = "audit_events"
    __table_args__ = (Index(None, "fleet_id", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)
