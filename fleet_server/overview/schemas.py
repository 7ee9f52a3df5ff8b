"""HTTP shapes of the overview."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum

from pydantic import Field

from fleet_server.schemas import Response


class ProfileCount(Response):
    """Devices of one profile."""

    profile: str | None = Field(description="Its name; null: devices that match none.")
    online: int
    offline: int


class ProviderCount(Response):
    """Devices that an execution provider really runs a model on."""

    provider: str
    devices: int
    fell_back: int = Field(description="Those of them where it does so in the place of the one their profile wants.")


class VersionCount(Response):
    """Devices that a version answers requests on."""

    model: str
    version: str
    devices: int


class AgentVersionCount(Response):
    """Devices whose agent is of a version."""

    version: str = Field(examples=["0.2.0"])
    devices: int


class DeviceCounts(Response):
    """Devices, those that were forgotten left out."""

    total: int
    online: int
    offline: int
    fell_back: int = Field(
        description="Those where another execution provider runs a model than the profile wants first."
    )
    by_profile: list[ProfileCount]
    by_provider: list[ProviderCount] = Field(
        description="By what really runs; a device counts once for each provider that runs a model there."
    )


class TelemetryTotals(Response):
    """What all models of the fleet did, as far as devices have told and the server has added it up."""

    since: dt.datetime
    until: dt.datetime
    requests: int
    errors: int
    latency_p50_ms: float | None = Field(description="Of all requests of all devices, within 2 %.")
    latency_p95_ms: float | None
    latency_p99_ms: float | None


class StepCode(StrEnum):
    """What would be done next."""

    NO_DEVICE = "no_device"
    ENROLMENTS_WAIT = "enrolments_wait"
    UNMATCHED_DEVICES = "unmatched_devices"
    NO_MODEL = "no_model"
    NO_VARIANT = "no_variant"
    READY_WITHOUT_ROLLOUT = "ready_without_rollout"


class NextStep(Response):
    """Something that would be done next."""

    code: StepCode
    text: str = Field(description="A sentence for people.")
    command: str = Field(description="The command that does it; what it names may have to be filled in.")


class Overview(Response):
    """A fleet now."""

    devices: DeviceCounts
    versions: list[VersionCount] = Field(description="What answers requests on devices, by model and version.")
    agent_versions: list[AgentVersionCount] = Field(
        description="Devices by the version of their agent, whether a release or what is installed."
    )
    deployments: dict[str, int] = Field(
        description="Deployments that have not settled, by phase; `scheduled` are those whose turn has not come."
    )
    rollouts: dict[str, int] = Field(description="Rollouts by state.")
    variants_building: int = Field(description="Variants that are being built, or wait for it.")
    enrolments_waiting: int = Field(description="Devices that wait for somebody to approve them.")
    telemetry: TelemetryTotals = Field(description="The last hour.")
    next_steps: list[NextStep] = Field(description="Empty where everything is under way.")


class HistoryPoint(Response):
    """A fleet in one step of its history."""

    at: dt.datetime = Field(description="When the step begins.")
    devices: int | None = Field(
        description="As it was in the last hour of the step that the server looked in; or null."
    )
    online: int | None
    versions: list[VersionCount] | None = Field(description="What answered requests on devices then.")
    requests: int
    errors: int
    latency_p50_ms: float | None = Field(description="Of all requests of all devices in the step, within 2 %.")
    latency_p95_ms: float | None
    latency_p99_ms: float | None


class History(Response):
    """How a fleet was over time; steps that nothing is known of are left out."""

    step_s: int
    since: dt.datetime
    until: dt.datetime
    points: list[HistoryPoint]
