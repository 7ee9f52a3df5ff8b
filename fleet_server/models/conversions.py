"""Conversion jobs: the rows are the truth; whoever holds a row's lease runs it."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class ConversionJob(Base):
    """The work of building one variant.

    `state` is queued, running, succeeded, failed or cancelled. `attempts` counts claims and only grows: it tells a
    runner that came late from the present one. `lost` counts the runners that died. A queued job whose `retry_at`
    lies ahead waits for it: what it needs is not there yet. Jobs of the same `work` convert the same files by the same
    recipes: they run one after another, so that the later ones find what the first made.
    """

    __tablename__ = "conversion_jobs"
    __table_args__ = (Index(None, "state", "id"), Index(None, "variant_id"))

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    variant_id: Mapped[str] = mapped_column(ForeignKey("variants.id"))
    state: Mapped[str] = mapped_column(default="queued")
    attempts: Mapped[int] = mapped_column(default=0)
    lost: Mapped[int] = mapped_column(default=0, server_default="0")
    retry_at: Mapped[dt.datetime | None]
    work: Mapped[str | None]
    training: Mapped[dict[str, Any] | None]  # TrainingPlan, as JSON
    lease_owner: Mapped[str | None]
    lease_until: Mapped[dt.datetime | None]
    progress: Mapped[float] = mapped_column(default=0.0)
    step: Mapped[str] = mapped_column(default="")
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]
