"""Telemetry as it is stored: what was measured (series), windows of it, roll-ups of windows, and which batches are in.

The many rows (names, windows) have no foreign keys but to their series: one module writes them and one removes them.
"""

from __future__ import annotations

import datetime as dt

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, LargeBinary, UniqueConstraint, false, text
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base

NUMBER = BigInteger().with_variant(Integer(), "sqlite")  # there only an INTEGER key counts by itself
# As SQLAlchemy writes `~column` there: a partial index serves conditions that say the same in the same words.
_OPEN, _OPEN_IN_SQLITE = text("NOT rolled_up"), text("rolled_up = 0")
_UNJUDGED, _UNJUDGED_IN_SQLITE = text("NOT judged"), text("judged = 0")


class TelemetryGroup(Base):
    """Batches of one fleet that were stored in one transaction.

    Once `rolled_up`, its windows are in roll-ups too. Once `emptied`, they are there alone; of such groups the newest
    one stays, and says from when on windows are there.
    """

    __tablename__ = "telemetry_groups"
    __table_args__ = (
        Index("ix_telemetry_groups_open", "id", postgresql_where=_OPEN, sqlite_where=_OPEN_IN_SQLITE),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(NUMBER, primary_key=True, autoincrement=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    stored_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    rolled_up: Mapped[bool] = mapped_column(default=False, server_default=false())
    emptied: Mapped[bool] = mapped_column(default=False, server_default=false())


class TelemetryBatchRow(Base):
    """The name of a batch that was stored: what makes a repeated one harmless. `TelemetrySpool` takes it over."""

    __tablename__ = "telemetry_batches"
    __table_args__ = (Index(None, "group_id"),)

    device_id: Mapped[str] = mapped_column(primary_key=True)
    spool_id: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    fleet_id: Mapped[str]
    group_id: Mapped[int] = mapped_column(BigInteger)


class TelemetrySpool(Base):
    """Which batches of a spool were stored and have no name of their own any more; kept for ever: it is small."""

    __tablename__ = "telemetry_spools"

    device_id: Mapped[str] = mapped_column(primary_key=True)
    spool_id: Mapped[str] = mapped_column(primary_key=True)
    fleet_id: Mapped[str]
    stored: Mapped[bytes] = mapped_column(LargeBinary)  # fleet_server.telemetry.sequences


class TelemetrySeries(Base):
    """What windows are of: one artifact, brought by one deployment, run by one provider on one device."""

    __tablename__ = "telemetry_series"
    __table_args__ = (
        UniqueConstraint(
            *("device_id", "deployment_id", "model", "version", "digest", "provider"), name="uq_telemetry_series_of"
        ),
        Index(None, "fleet_id", "model", "version"),
        Index(None, "fleet_id", "device_id", "model", "version"),
        Index(None, "deployment_id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(NUMBER, primary_key=True, autoincrement=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    deployment_id: Mapped[str]
    model: Mapped[str]
    version: Mapped[str]
    digest: Mapped[str]
    provider: Mapped[str]


class ModelWindowRow(Base):
    """One window of a series, as its device sent it."""

    __tablename__ = "model_windows"
    __table_args__ = (
        Index(None, "series_id", "ended_at"),
        Index("ix_model_windows_to_judge", "series_id", postgresql_where=_UNJUDGED, sqlite_where=_UNJUDGED_IN_SQLITE),
    )

    group_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # within its group
    series_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("telemetry_series.id"))
    started_at: Mapped[dt.datetime]
    ended_at: Mapped[dt.datetime]
    requests: Mapped[int] = mapped_column(BigInteger)
    errors: Mapped[int] = mapped_column(BigInteger)
    rejected: Mapped[int] = mapped_column(BigInteger)
    items: Mapped[int] = mapped_column(BigInteger)
    latency: Mapped[bytes] = mapped_column(LargeBinary)  # fleet_server.telemetry.sketches
    confusion: Mapped[bytes] = mapped_column(LargeBinary)
    signals: Mapped[bytes | None] = mapped_column(LargeBinary)  # fleet_server.telemetry.signals
    judged: Mapped[bool] = mapped_column(default=False, server_default=false())  # by its rollout's stop rules


class TelemetryRollup(Base):
    """The windows of a series that ended in one hour or one day (`step_s` seconds from `period_at`), added up."""

    __tablename__ = "telemetry_rollups"
    __table_args__ = (Index(None, "step_s", "period_at"),)

    series_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("telemetry_series.id"), primary_key=True)
    step_s: Mapped[int] = mapped_column(primary_key=True)
    period_at: Mapped[dt.datetime] = mapped_column(primary_key=True)
    started_at: Mapped[dt.datetime]  # of the window that started first
    ended_at: Mapped[dt.datetime]  # of the window that ended last
    busy_s: Mapped[float]  # of windows that had requests
    requests: Mapped[int] = mapped_column(BigInteger)
    errors: Mapped[int] = mapped_column(BigInteger)
    rejected: Mapped[int] = mapped_column(BigInteger)
    items: Mapped[int] = mapped_column(BigInteger)
    latency: Mapped[bytes] = mapped_column(LargeBinary)
    confusion: Mapped[bytes] = mapped_column(LargeBinary)


class TelemetryFleetTotal(Base):
    """What all models of a fleet did in the windows that ended in `step_s` seconds from `period_at`.

    Written with the roll-up of those windows, so that nobody adds up a fleet to know how it does.
    """

    __tablename__ = "telemetry_fleet_totals"
    __table_args__ = (Index(None, "step_s", "period_at"),)

    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"), primary_key=True)
    step_s: Mapped[int] = mapped_column(primary_key=True)
    period_at: Mapped[dt.datetime] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    errors: Mapped[int] = mapped_column(BigInteger)
    latency: Mapped[bytes] = mapped_column(LargeBinary)  # fleet_server.telemetry.sketches


class HostWindowRow(Base):
    """The device itself at the end of a window."""

    __tablename__ = "host_windows"
    __table_args__ = (
        Index(None, "fleet_id", "device_id", "id"),
        Index(None, "fleet_id", "id"),
        Index(None, "ended_at"),
    )

    id: Mapped[int] = mapped_column(NUMBER, primary_key=True, autoincrement=True)
    fleet_id: Mapped[str]
    device_id: Mapped[str]
    ended_at: Mapped[dt.datetime]
    cpu_percent: Mapped[float | None]
    memory_used_mb: Mapped[float | None]
    agent_rss_mb: Mapped[float | None]
    temperature_c: Mapped[float | None]
    disk_free_mb: Mapped[float | None]
