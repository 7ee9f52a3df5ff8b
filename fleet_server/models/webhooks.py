"""Who is told of events by HTTP, and what is, or was, to be told them."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index, Text
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class Webhook(Base):
    """A subscription. Its secrets are kept as they are: every event is signed with them."""

    __tablename__ = "webhooks"
    __table_args__ = (Index(None, "fleet_id", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    url: Mapped[str]
    description: Mapped[str] = mapped_column(default="")
    types: Mapped[list[Any]]  # patterns of event types
    active: Mapped[bool] = mapped_column(default=True)
    stopped_because: Mapped[str] = mapped_column(default="")  # why the server made it inactive; empty when people did
    secret: Mapped[str]
    old_secret: Mapped[str | None]  # signs too, until `old_secret_until`
    old_secret_until: Mapped[dt.datetime | None]
    created_by: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class WebhookDelivery(Base):
    """One event for one webhook, written with the change that it tells of. `state` is pending, delivered or dead."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index(None, "fleet_id", "id"),
        Index(None, "webhook_id", "subject", "state", "id"),
        Index(None, "state", "next_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id"))
    event_id: Mapped[str]  # the same for every webhook, however often it is sent
    type: Mapped[str]
    subject: Mapped[str]
    body: Mapped[str] = mapped_column(Text)  # the CloudEvent, as it is sent and signed
    state: Mapped[str] = mapped_column(default="pending")
    attempts: Mapped[int] = mapped_column(default=0)  # since `due_since`
    due_since: Mapped[dt.datetime] = mapped_column(default=utc_now)  # its age counts from here
    next_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    last_status: Mapped[int | None]  # of the last answer; None when none came
    last_detail: Mapped[str] = mapped_column(default="")
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    finished_at: Mapped[dt.datetime | None]
