"""What servers need to run: who they are, leases between them, and messages that must be sent."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index, LargeBinary, text
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


class Server(Base):
    """A server that works on this database, by its number; a row whose time is over is free for another."""

    __tablename__ = "servers"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    host: Mapped[str]
    version: Mapped[str]
    shared: Mapped[str]  # what servers of one database must have in common, as text to compare
    started_at: Mapped[dt.datetime]
    until: Mapped[dt.datetime]


class DeviceShard(Base):
    """Which server handles the messages of the devices of a shard, for as long as that server lives."""

    __tablename__ = "device_shards"

    shard: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    owner: Mapped[str]  # name of a server; empty: it was given up
    confirmed: Mapped[bool]  # the owner hears the shard's devices


class SchemaFloor(Base):
    """The last migration that older servers do not work with; one row, or none."""

    __tablename__ = "schema_floor"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    revision: Mapped[str]


class OutboxMessage(Base):
    """A message written with the change that caused it, deleted when the broker has acknowledged it."""

    __tablename__ = "outbox"
    __table_args__ = (Index(None, "topic", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    topic: Mapped[str]
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    retain: Mapped[bool]
    shard: Mapped[int] = mapped_column(server_default=text("0"))  # whose server sends it
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
