"""HTTP shapes of gate runs."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from typing import Any

from pydantic import Field

from fleet_server.catalog.schemas import GateVerdict
from fleet_server.schemas import Failure, Name, Request, Response, example


class GateRunState(StrEnum):
    """Where a gate run is."""

    RUNNING = "running"
    PASSED = "passed"  # the variant is ready, and proven
    REFUSED = "refused"  # no candidate keeps the budgets on the devices: the variant is refused
    FAILED = "failed"  # no device finished: the variant is as it was
    CANCELLED = "cancelled"


class GateRunCreate(Request):
    """Measure a variant's candidates on devices of its profile."""

    model_config = example(version="mnist@2", profile="rpi5-litert", devices=["camera-01"])

    version: str = Field(description="`model@version`.", pattern=r"^[^@\s]+@[^@\s]+$")
    profile: Name
    devices: list[Name] = Field(
        default_factory=list, max_length=100, description="Which devices; by default some that are online."
    )
    count: int = Field(1, ge=1, le=100, description="How many devices, where none is named.")
    timeout_s: float = Field(
        1800.0, gt=0, le=86_400, description="When what has not finished counts as failed, in seconds."
    )


class GateTrialView(Response):
    """One device's part in a gate run."""

    device_id: str
    phase: str = Field(description="pending, downloading, measuring, done or failed.")
    results: list[dict[str, Any]] = Field(
        description="What was measured of each candidate: `agent.protocol.messages.TrialResult`, with its recipe."
    )
    failure: Failure | None


class GateRunView(Response):
    """A gate run."""

    observed = frozenset({"trials"})

    id: str
    variant_id: str
    model: str
    version: str
    profile: str
    state: GateRunState
    detail: str = Field(description="What came of it, in a sentence.")
    candidates: int
    trials: list[GateTrialView]
    verdict: GateVerdict | None
    created_at: dt.datetime
    deadline_at: dt.datetime
    finished_at: dt.datetime | None
