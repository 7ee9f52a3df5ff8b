"""Alert rules, alerts, who is told of them and when, silences, and e-mails that are to be sent."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, Text, UniqueConstraint, false, text
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class AlertRule(Base):
    """What is looked at, and when it is bad. `spec` is `fleet_server.alerts.schemas.RuleSpec` as JSON."""

    __tablename__ = "alert_rules"
    __table_args__ = (UniqueConstraint("fleet_id", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    shipped: Mapped[bool] = mapped_column(default=False, server_default=false())
    problem: Mapped[str] = mapped_column(default="", server_default="")  # why it can't be looked at; empty when it can
    # The rule's own clock: it never goes back, whichever server looks. Times of alerts and of what was told are by it.
    clock_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    created_by: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class Alert(Base):
    """A rule that holds, or held, for one subject. `state` is `fleet_server.domain.alerting.AlertState`."""

    __tablename__ = "alerts"
    __table_args__ = (
        Index(None, "fleet_id", "id"),
        Index(None, "fleet_id", "state", "id"),
        Index(None, "rule_id", "state", "heard_at"),
        Index(None, "rule_id", "resolved_at"),
        Index(None, "device_id", "id"),
        Index(
            "uq_alerts_open",
            "rule_id",
            "subject",
            unique=True,
            sqlite_where=text("state <> 'resolved'"),
            postgresql_where=text("state <> 'resolved'"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    rule_id: Mapped[str]  # the rule may go, what came of it stays
    rule: Mapped[str]  # its name
    metric: Mapped[str]
    severity: Mapped[str]
    subject: Mapped[str]  # such as device/cam-1, device/cam-1/model/yolo, rollout/0190…
    device_id: Mapped[str | None]
    model: Mapped[str | None]
    rollout_id: Mapped[str | None]
    state: Mapped[str]
    value: Mapped[float | None]  # when it began, or began to fire
    detail: Mapped[str] = mapped_column(default="")
    since: Mapped[dt.datetime]
    firing_at: Mapped[dt.datetime | None]
    clearing_since: Mapped[dt.datetime | None]
    resolved_at: Mapped[dt.datetime | None]
    resolution: Mapped[str] = mapped_column(default="")
    heard_at: Mapped[dt.datetime | None]  # since when routes may be told: not while it is silenced
    acknowledged_at: Mapped[dt.datetime | None]
    acknowledged_by: Mapped[str] = mapped_column(default="")
    comment: Mapped[str] = mapped_column(default="")


class AlertRoute(Base):
    """Who is told. `spec` is `fleet_server.alerts.schemas.RouteSpec` as JSON."""

    __tablename__ = "alert_routes"
    __table_args__ = (UniqueConstraint("fleet_id", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    shipped: Mapped[bool] = mapped_column(default=False, server_default=false())
    created_by: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class AlertGroup(Base):
    """What a route was told of a rule's alerts: they are told together."""

    __tablename__ = "alert_groups"

    rule_id: Mapped[str] = mapped_column(ForeignKey("alert_rules.id", ondelete="CASCADE"), primary_key=True)
    route_id: Mapped[str] = mapped_column(ForeignKey("alert_routes.id", ondelete="CASCADE"), primary_key=True)
    told_at: Mapped[dt.datetime | None]
    news_since: Mapped[dt.datetime | None]


class AlertSilence(Base):
    """Alerts that it matches are told to nobody from `starts_at` to `ends_at`."""

    __tablename__ = "alert_silences"
    __table_args__ = (Index(None, "fleet_id", "ends_at"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    rule: Mapped[str | None]  # name of a rule; a * stands for any characters
    query: Mapped[str | None] = mapped_column(Text)  # of devices, in RSQL
    subject: Mapped[str | None]  # a * stands for any characters
    starts_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    ends_at: Mapped[dt.datetime]
    comment: Mapped[str]
    created_by: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class AlertMail(Base):
    """An e-mail, written with the change that it tells of. `state` is pending, sent or dead."""

    __tablename__ = "alert_mails"
    __table_args__ = (Index(None, "state", "next_at"), Index(None, "route_id", "id"))

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    route_id: Mapped[str] = mapped_column(ForeignKey("alert_routes.id", ondelete="CASCADE"))
    recipients: Mapped[list[Any]]
    subject: Mapped[str]
    body: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(default="pending")
    attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    last_detail: Mapped[str] = mapped_column(default="")
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    finished_at: Mapped[dt.datetime | None]


class DriftReference(Base):
    """What a series was like when it was first looked at for drift: later looks are compared with it."""

    __tablename__ = "drift_references"

    series_id: Mapped[int] = mapped_column(
        BigInteger, ForeignKey("telemetry_series.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
    )
    shapes: Mapped[bytes] = mapped_column(LargeBinary)  # fleet_server.alerts.drift
    rows: Mapped[int]
    taken_at: Mapped[dt.datetime]


class ModelDrift(Base):
    """How far a model on a device had moved from its series' reference when it was last looked at for drift."""

    __tablename__ = "model_drifts"
    __table_args__ = (
        UniqueConstraint("series_id"),
        Index(None, "fleet_id", "worst", "series_id"),
        Index(None, "fleet_id", "at", "series_id"),
    )

    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    version: Mapped[str]
    series_id: Mapped[int] = mapped_column(BigInteger)
    worst: Mapped[float]  # the largest of those that there are
    input_drift: Mapped[float | None]
    output_drift: Mapped[float | None]
    confidence_shift: Mapped[float | None]
    requests: Mapped[int] = mapped_column(BigInteger)  # of the windows that were looked at
    since: Mapped[dt.datetime]  # windows that ended from then
    at: Mapped[dt.datetime]  # to then
