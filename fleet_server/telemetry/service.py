"""Rules of telemetry: a batch is stored once, and summed up when somebody asks."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.histogram import merge, percentile
from agent.protocol.messages import ModelWindow, TelemetryBatch
from fleet_server.models import Device, HostWindowRow, ModelWindowRow, TelemetryBatchRow
from fleet_server.telemetry import repository
from fleet_server.telemetry.metrics import scores
from fleet_server.telemetry.repository import WindowFilter
from fleet_server.telemetry.schemas import ModelTelemetry

LONGEST_WINDOW_S = 86_400.0
CLOCK_SLACK = dt.timedelta(minutes=5)
SIGNALS = ("confidence", "predicted", "inputs", "outputs", "crashes", "shadowed", "compared", "disagreed", "dropped")


def store_batch(session: Session, device_id: str, batch: TelemetryBatch, now: dt.datetime) -> bool:
    """Store a batch; one that is stored already changes nothing.

    Returns:
        Whether the device may forget it: false only for a device that is not known.
    """
    device = session.get(Device, device_id)
    if device is None:
        return False
    if repository.has_batch(session, device_id, batch.spool_id, batch.sequence):
        return True
    started, ended = _window(batch, now)
    where = {"fleet_id": device.fleet_id, "device_id": device_id}
    session.add(TelemetryBatchRow(**where, spool_id=batch.spool_id, sequence=batch.sequence, received_at=now))
    for model in batch.models:
        session.add(
            ModelWindowRow(
                **where,
                deployment_id=model.deployment_id,
                model=model.model,
                version=model.version,
                digest=model.digest,
                provider=model.provider,
                started_at=started,
                ended_at=ended,
                requests=model.requests,
                errors=model.errors,
                rejected=model.rejected,
                items=model.items,
                latency={str(bucket): count for bucket, count in model.latency.items()},
                confusion=[list(cell) for cell in model.confusion],
                signals=_signals(model),
            )
        )
    host = batch.host
    session.add(
        HostWindowRow(
            **where,
            ended_at=ended,
            cpu_percent=host.cpu_percent,
            memory_used_mb=host.memory_used_mb,
            agent_rss_mb=host.agent_rss_mb,
            temperature_c=host.temperature_c,
            disk_free_mb=host.disk_free_mb,
        )
    )
    device.last_seen_at = now
    return True


def _signals(model: ModelWindow) -> dict[str, Any]:
    """The fields of a window that have no column of their own, as in JSON; those that say nothing are left out."""
    fields = {name: getattr(model, name) for name in SIGNALS}
    return {name: msgspec.to_builtins(value, str_keys=True) for name, value in fields.items() if value}


def _window(batch: TelemetryBatch, now: dt.datetime) -> tuple[dt.datetime, dt.datetime]:
    """The window's times; those of a clock that is ahead of ours, or impossible, are moved to end now."""
    length = batch.ended_at - batch.started_at
    length = min(max(length, 0.0), LONGEST_WINDOW_S) if math.isfinite(length) else 0.0
    try:
        ended = dt.datetime.fromtimestamp(batch.ended_at, dt.UTC)
    except (ValueError, OverflowError, OSError):
        ended = now
    if ended > now + CLOCK_SLACK or ended.year < 2020:
        ended = now
    return ended - dt.timedelta(seconds=length), ended


@dataclass
class _Sum:
    digest: str
    provider: str
    first_at: dt.datetime
    last_at: dt.datetime
    seconds: float = 0.0
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("requests", "errors", "rejected", "items"), 0)
    )
    latency: dict[int, int] = field(default_factory=dict)
    cells: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, row: ModelWindowRow) -> None:
        self.last_at, self.digest, self.provider = row.ended_at, row.digest, row.provider
        if row.requests:
            self.seconds += (row.ended_at - row.started_at).total_seconds()
        for name in self.counts:
            self.counts[name] += getattr(row, name)
        merge(self.latency, {int(bucket): count for bucket, count in row.latency.items()})
        self.cells += [(label, predicted, count) for label, predicted, count in row.confusion]


def summarize(
    session: Session,
    fleet_id: str,
    *,
    model: str | None = None,
    version: str | None = None,
    device_id: str | None = None,
    deployment_ids: Sequence[str] | None = None,
    since: dt.datetime | None = None,
    until: dt.datetime | None = None,
    by_device: bool = True,
) -> list[ModelTelemetry]:
    """What each version did, on each device or over all of them, in the windows that ended from `since` to `until`."""
    wanted = WindowFilter(model, version, device_id, deployment_ids, since, until)
    sums: dict[tuple[str, str, str | None], _Sum] = {}
    for row in repository.model_windows(session, fleet_id, wanted):
        key = (row.model, row.version, row.device_id if by_device else None)
        if key not in sums:
            sums[key] = _Sum(row.digest, row.provider, row.started_at, row.ended_at)
        sums[key].add(row)
    return [_telemetry(key, total) for key, total in sorted(sums.items(), key=lambda item: tuple(map(str, item[0])))]


def _telemetry(key: tuple[str, str, str | None], total: _Sum) -> ModelTelemetry:
    model, version, device_id = key
    quality = scores(total.cells)

    def milliseconds(quantile: float) -> float | None:
        seconds = percentile(total.latency, quantile)
        return None if seconds is None else seconds * 1000

    return ModelTelemetry(
        device_id=device_id,
        model=model,
        version=version,
        digest=total.digest if device_id else None,
        provider=total.provider if device_id else None,
        **total.counts,
        throughput_per_s=total.counts["requests"] / total.seconds if total.seconds else None,
        latency_p50_ms=milliseconds(0.5),
        latency_p95_ms=milliseconds(0.95),
        latency_p99_ms=milliseconds(0.99),
        labelled=quality.labelled,
        accuracy=quality.accuracy,
        macro_precision=quality.macro_precision,
        macro_recall=quality.macro_recall,
        macro_f1=quality.macro_f1,
        classes=quality.classes,
        first_at=total.first_at,
        last_at=total.last_at,
    )
