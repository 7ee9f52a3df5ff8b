"""Gate runs: candidates of a variant, measured on devices of its profile."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class GateRun(Base):
    """One asking for measurements. `state` is `fleet_server.gates.schemas.GateRunState`."""

    __tablename__ = "gate_runs"
    __table_args__ = (Index(None, "fleet_id", "id"), Index(None, "variant_id"), Index(None, "state"))

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    variant_id: Mapped[str] = mapped_column(ForeignKey("variants.id"))
    state: Mapped[str]
    candidates: Mapped[list[Any]]  # agent.protocol.manifest.Manifest of each, the reference first, as JSON
    data: Mapped[dict[str, Any]]  # agent.protocol.manifest.DataFile, as JSON
    verdict: Mapped[dict[str, Any] | None]  # GateVerdict, as JSON
    detail: Mapped[str] = mapped_column(default="")  # what came of it, in a sentence
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    deadline_at: Mapped[dt.datetime]
    finished_at: Mapped[dt.datetime | None]


class GateTrial(Base):
    """One device's part in a gate run. `phase` is `agent.protocol.messages.TrialPhase`."""

    __tablename__ = "gate_trials"
    __table_args__ = (Index(None, "run_id"), Index(None, "device_id", "phase"))

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    run_id: Mapped[str] = mapped_column(ForeignKey("gate_runs.id"))
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    phase: Mapped[str] = mapped_column(default="pending")
    results: Mapped[list[Any]] = mapped_column(default=list)  # agent.protocol.messages.TrialResult, as JSON
    failure: Mapped[dict[str, Any] | None]  # {"code", "detail"}
