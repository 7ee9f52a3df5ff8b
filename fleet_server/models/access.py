"""Fleets, who may do what in them, and what was done there."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint, false, text
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class Fleet(Base):
    """A set of devices with its models: a tenant."""

    __tablename__ = "fleets"

    id: Mapped[str] = mapped_column(primary_key=True)
    approvals: Mapped[int] = mapped_column(default=0)  # how many others must approve a rollout before it starts
    alert_defaults: Mapped[int] = mapped_column(default=0, server_default=text("0"))  # shipped alert rules that it got
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class User(Base):
    """A person. The hash of the password is argon2id in its standard text form (RFC 9106)."""

    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("name"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    name: Mapped[str]
    password_hash: Mapped[str]
    server_wide: Mapped[bool] = mapped_column(default=False, server_default=false())  # admin of every fleet
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class Grant(Base):
    """A user's role in a fleet. `role` is `fleet_server.principals.Role`."""

    __tablename__ = "grants"
    __table_args__ = (Index(None, "fleet_id"),)

    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), primary_key=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"), primary_key=True)
    role: Mapped[str]


class AccessToken(Base):
    """A bearer token: of a service (with a name, a fleet and a role), or of a user's session (with that user).

    `digest` is the SHA-256 of its secret, which is shown once: 256 random bits need no slow hash. Without a fleet a
    service token is server-wide.
    """

    __tablename__ = "access_tokens"
    __table_args__ = (Index(None, "fleet_id", "id"), Index(None, "user_id"), Index(None, "expires_at"))

    id: Mapped[str] = mapped_column(primary_key=True)
    digest: Mapped[str]
    name: Mapped[str] = mapped_column(default="")
    user_id: Mapped[str | None] = mapped_column(ForeignKey("users.id"))
    fleet_id: Mapped[str | None] = mapped_column(ForeignKey("fleets.id"))
    role: Mapped[str] = mapped_column(default="")
    created_by: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    expires_at: Mapped[dt.datetime]
    revoked_at: Mapped[dt.datetime | None]
    last_used_at: Mapped[dt.datetime | None]  # to within a few minutes


class AuditEvent(Base):
    """One thing that somebody, or the server by itself, did; a link of its fleet's chain (`fleet_server.audit`).

    Only ever added: a trigger of the database refuses to change or remove a row.
    """

    __tablename__ = "audit_events"
    __table_args__ = (
        Index(None, "fleet_id", "id"),
        Index("uq_audit_events_chain", "fleet_id", "sequence", unique=True),
        Index(None, "fleet_id", "subject", "sequence"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    sequence: Mapped[int]  # from 1, without gaps, in each fleet
    at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    actor: Mapped[str]
    address: Mapped[str] = mapped_column(default="")
    request_id: Mapped[str] = mapped_column(default="")
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)
    before: Mapped[dict[str, Any] | None]
    after: Mapped[dict[str, Any] | None]
    previous_hash: Mapped[str]
    hash: Mapped[str]


class AuditHead(Base):
    """The newest link of a fleet's audit chain: locked by who adds the next one."""

    __tablename__ = "audit_heads"

    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"), primary_key=True)
    sequence: Mapped[int]
    hash: Mapped[str]
