"""What is kept of how fleets were."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.db import Base


class FleetSnapshot(Base):
    """How a fleet was in one hour: at a moment soon after `hour_at`."""

    __tablename__ = "fleet_snapshots"
    __table_args__ = (Index(None, "hour_at"),)

    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"), primary_key=True)
    hour_at: Mapped[dt.datetime] = mapped_column(primary_key=True)
    devices: Mapped[int]
    online: Mapped[int]
    versions: Mapped[list[Any]]  # fleet_server.overview.schemas.VersionCount, as JSON
