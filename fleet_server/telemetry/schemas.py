"""HTTP shapes of telemetry."""

from __future__ import annotations

import datetime as dt

from pydantic import Field

from fleet_server.schemas import Response


class ClassMetrics(Response):
    """One class, from labelled feedback."""

    label: int
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class ModelTelemetry(Response):
    """What one version did on one device (or on all, where `device_id` is null), summed over the asked time."""

    device_id: str | None
    model: str
    version: str
    digest: str | None
    provider: str | None
    requests: int
    errors: int
    rejected: int
    items: int
    throughput_per_s: float | None = Field(description="Requests a second over the windows that had any.")
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    latency_p99_ms: float | None
    labelled: int = Field(description="Predictions that feedback gave a label for.")
    accuracy: float | None
    macro_precision: float | None
    macro_recall: float | None
    macro_f1: float | None
    classes: list[ClassMetrics]
    first_at: dt.datetime
    last_at: dt.datetime


class HostTelemetry(Response):
    """A device's own state at one time; null where it can't be measured."""

    device_id: str
    at: dt.datetime
    cpu_percent: float | None
    memory_used_mb: float | None
    agent_rss_mb: float | None
    temperature_c: float | None
    disk_free_mb: float | None


class TelemetryPoint(Response):
    """What a version did in one step of a series: in the windows that ended in it."""

    at: dt.datetime = Field(description="When the step begins.")
    requests: int
    errors: int
    rejected: int
    items: int
    devices: int = Field(description="Devices that it was heard of from.")
    latency_p50_ms: float | None = Field(description="Of all requests of all devices in the step, within 2 %.")
    latency_p95_ms: float | None
    latency_p99_ms: float | None
    labelled: int = Field(description="Predictions that feedback gave a label for in the step.")
    accuracy: float | None


class TelemetrySteps(Response):
    """A series: steps without a window are left out."""

    model: str
    version: str
    step_s: int
    since: dt.datetime
    until: dt.datetime
    points: list[TelemetryPoint]
