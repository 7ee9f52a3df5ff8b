"""What the supervisor says of itself to whoever asks the local API how the agent is."""

from __future__ import annotations

import msgspec


class PhaseFigure(msgspec.Struct, frozen=True):
    """Where one deployment is."""

    deployment_id: str
    model: str
    version: str
    phase: str


class SupervisorFigures(msgspec.Struct, frozen=True):
    """What the supervisor says of itself.

    Attributes:
        device_id: this device's name.
        connected: whether the broker has accepted the connection.
        spooled: batches of telemetry that the server has not acknowledged.
        spooled_bytes: what those take.
        spool_dropped: batches that were thrown away, or could not be kept, since the agent started.
        workers_ended: how often the worker ended without being asked to, since the agent started.
        problems: that hold now, or were lived through and are still told.
        rss_mb: resident memory in MiB.
        deployments: all that have not been forgotten.
    """

    device_id: str
    connected: bool
    spooled: int
    spooled_bytes: int
    spool_dropped: int
    workers_ended: int
    problems: int
    rss_mb: float
    deployments: tuple[PhaseFigure, ...] = ()
