"""Telemetry windows as devices sent them; a batch is stored once, however often it is sent."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint, false, text
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.db import Base, new_id, utc_now


class TelemetryBatchRow(Base):
    """That a batch was stored: what makes a repeated one harmless."""

    __tablename__ = "telemetry_batches"
    __table_args__ = (UniqueConstraint("device_id", "spool_id", "sequence"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    spool_id: Mapped[str]
    sequence: Mapped[int] = mapped_column(BigInteger)
    received_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class ModelWindowRow(Base):
    """What one artifact did on one device in one window."""

    __tablename__ = "model_windows"
    __table_args__ = (
        Index(
            "ix_model_windows_to_judge",
            "deployment_id",
            sqlite_where=text("judged = 0"),
            postgresql_where=text("NOT judged"),
        ),
        Index(None, "deployment_id", "ended_at"),
        Index(None, "fleet_id", "device_id", "ended_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    deployment_id: Mapped[str]
    model: Mapped[str]
    version: Mapped[str]
    digest: Mapped[str]
    provider: Mapped[str]
    started_at: Mapped[dt.datetime]
    ended_at: Mapped[dt.datetime]
    requests: Mapped[int] = mapped_column(BigInteger)
    errors: Mapped[int] = mapped_column(BigInteger)
    rejected: Mapped[int] = mapped_column(BigInteger)
    items: Mapped[int] = mapped_column(BigInteger)
    latency: Mapped[dict[str, Any]]  # bucket -> count: agent.protocol.histogram
    confusion: Mapped[list[Any]]  # [label, predicted, count]
    judged: Mapped[bool] = mapped_column(default=False, server_default=false())  # by its rollout's stop rules
    # What a window says beyond that, by the field's name: see `agent.protocol.messages.ModelWindow`.
    signals: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")


class HostWindowRow(Base):
    """The device itself at the end of a window."""

    __tablename__ = "host_windows"
    __table_args__ = (Index(None, "fleet_id", "device_id", "ended_at"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    ended_at: Mapped[dt.datetime]
    cpu_percent: Mapped[float | None]
    memory_used_mb: Mapped[float | None]
    agent_rss_mb: Mapped[float | None]
    temperature_c: Mapped[float | None]
    disk_free_mb: Mapped[float | None]
