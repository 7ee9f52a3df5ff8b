"""Rules of telemetry: a batch is stored once, and summed up when somebody asks."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy.orm import Session

from agent.protocol.histogram import percentile
from agent.protocol.messages import TelemetryBatch
from fleet_server.telemetry import repository
from fleet_server.telemetry.ingest import Sent, store_group
from fleet_server.telemetry.metrics import scores
from fleet_server.telemetry.repository import SeriesKey, WindowFilter
from fleet_server.telemetry.schemas import ModelTelemetry
from fleet_server.telemetry.totals import Total


def store_batch(session: Session, device_id: str, batch: TelemetryBatch, now: dt.datetime) -> bool:
    """Store a batch; one that is stored already changes nothing.

    Returns:
        Whether the device may forget it: false only for a device that is not known, or is locked out.
    """
    return bool(store_group(session, [Sent(device_id, batch)], now))


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
    """What each version did, on each device or over all of them, in the windows that ended from `since` to `until`.

    It reads roll-ups, and windows only where they are not in one or where a part of an hour is asked for.
    """
    wanted = WindowFilter(model, version, device_id, deployment_ids, since, until)
    by_series: dict[int, Total] = {}
    for part in repository.parts(session, fleet_id, wanted):
        if part.series_id not in by_series:
            by_series[part.series_id] = Total(part.started_at, part.ended_at)
        by_series[part.series_id].add(part)
    keys = repository.series_of(session, by_series)
    found: dict[tuple[str, str, str], list[tuple[SeriesKey, Total]]] = defaultdict(list)
    for series_id, total in by_series.items():
        key = keys[series_id]
        found[key.model, key.version, key.device_id if by_device else ""].append((key, total))
    return [_telemetry(found[key], by_device=by_device) for key in sorted(found)]


def _telemetry(found: Sequence[tuple[SeriesKey, Total]], *, by_device: bool) -> ModelTelemetry:
    newest, total = max(found, key=lambda one: one[1].ended_at)
    for _, other in found:
        if other is not total:
            total.merge(other)
    quality = scores(total.cells)
    return ModelTelemetry(
        device_id=newest.device_id if by_device else None,
        model=newest.model,
        version=newest.version,
        digest=newest.digest if by_device else None,
        provider=newest.provider if by_device else None,
        requests=total.requests,
        errors=total.errors,
        rejected=total.rejected,
        items=total.items,
        throughput_per_s=total.requests / total.busy_s if total.busy_s else None,
        latency_p50_ms=milliseconds(total, 0.5),
        latency_p95_ms=milliseconds(total, 0.95),
        latency_p99_ms=milliseconds(total, 0.99),
        labelled=quality.labelled,
        accuracy=quality.accuracy,
        macro_precision=quality.macro_precision,
        macro_recall=quality.macro_recall,
        macro_f1=quality.macro_f1,
        classes=quality.classes,
        first_at=total.started_at,
        last_at=total.ended_at,
    )


def milliseconds(total: Total, quantile: float) -> float | None:
    """A percentile of the latency of a sum, within the sketch's 2 %; None without requests."""
    seconds = percentile(total.latency, quantile)
    return None if seconds is None else seconds * 1000
