"""Devices and profiles."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class Profile(Base):
    """A named kind of device; or a platform that releases of the agent are made for (`kind`: `model` or `platform`).

    `spec` is `fleet_server.devices.schemas.ProfileSpec` as JSON; of a platform `{"platform": …}`.
    """

    __tablename__ = "profiles"
    __table_args__ = (UniqueConstraint("fleet_id", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    name: Mapped[str]
    kind: Mapped[str] = mapped_column(default="model", server_default="model")
    spec: Mapped[dict[str, Any]]
    delivery: Mapped[dict[str, Any] | None]  # fleet_server.devices.delivery.Delivery, as JSON
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class Device(Base):
    """One device as the server knows it: what it last reported, what people said of it, what it ought to be at."""

    __tablename__ = "devices"
    __table_args__ = (
        Index(None, "fleet_id", "id"),
        Index(None, "fleet_id", "profile_id"),
        Index(None, "fleet_id", "created_at", "id"),
        # All that counting reads; forgotten_at is last, or SQLite would take this index for lists by id too.
        Index("ix_devices_counted", "fleet_id", "profile_id", "online", "forgotten_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    facts: Mapped[dict[str, Any]] = mapped_column(default=dict)
    tags: Mapped[dict[str, Any]] = mapped_column(default=dict)  # people's; the device's own are in facts.tags
    profile_id: Mapped[str | None] = mapped_column(ForeignKey("profiles.id"))
    profile_pinned: Mapped[bool] = mapped_column(default=False)
    online: Mapped[bool] = mapped_column(default=False)
    last_seen_at: Mapped[dt.datetime | None]
    boot_id: Mapped[str | None]
    earlier_boots: Mapped[list[Any] | None]  # ids of the boots before that one, the newest last
    reported_sequence: Mapped[int] = mapped_column(default=0)
    reported_revision: Mapped[int] = mapped_column(default=0)
    reported_deployments: Mapped[list[Any]] = mapped_column(default=list)  # DeploymentReport, as JSON
    serving: Mapped[list[Any]] = mapped_column(default=list)  # ServingReport, as JSON
    problems: Mapped[list[Any]] = mapped_column(default=list)  # Problem, as JSON
    desired_revision: Mapped[int] = mapped_column(default=0)
    hold: Mapped[dict[str, Any] | None]  # fleet_server.devices.schemas.Hold, as JSON: no rollout sends it anything
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    forgotten_at: Mapped[dt.datetime | None]  # hidden since then; it is back when it connects again


class DeviceAttribute(Base):
    """One thing a device can be asked for by (`fleet_server.devices.attributes`), kept as its device says it is."""

    __tablename__ = "device_attributes"
    __table_args__ = (
        Index("ix_device_attributes_text", "fleet_id", "name", "text"),
        Index("ix_device_attributes_number", "fleet_id", "name", "number"),
    )

    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(primary_key=True)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    number: Mapped[float | None]
