"""Shard plans: models that are cut into stages, and which device has which stage."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class ShardPlan(Base):
    """A version in stages. `state` is `fleet_server.shards.schemas.PlanState`."""

    __tablename__ = "shard_plans"
    __table_args__ = (Index(None, "fleet_id", "id"), Index(None, "version_id"), Index(None, "state"))

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    version_id: Mapped[str] = mapped_column(ForeignKey("versions.id"))
    state: Mapped[str]
    order: Mapped[dict[str, Any]]  # fleet_server.shards.schemas.ShardPlanCreate, as JSON
    stages: Mapped[list[Any]]  # fleet_server.shards.schemas.StageView, as JSON
    proof: Mapped[dict[str, Any]]  # fleet_server.shards.schemas.ProofView, as JSON
    detail: Mapped[str] = mapped_column(default="")  # what it waits for, or why it failed, in a sentence
    created_by: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[dt.datetime] = mapped_column(default=utc_now, onupdate=utc_now)
