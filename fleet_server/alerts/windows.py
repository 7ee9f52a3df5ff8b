"""What models did on devices lately, by their telemetry windows: counts are added up by the database, sketches here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from sqlalchemy import func, select

from agent.protocol.histogram import merge, percentile
from fleet_server.alerts.scope import Rows, Scope
from fleet_server.alerts.subjects import Findings, Found, Subject
from fleet_server.domain.alerting import Metric
from fleet_server.models import DeviceAttribute, ModelWindowRow, TelemetrySeries
from fleet_server.telemetry.sketches import unpack_cells, unpack_latency

ROWS = 5_000  # at a time
QUANTILES = {Metric.LATENCY_P50_MS: 0.5, Metric.LATENCY_P95_MS: 0.95, Metric.LATENCY_P99_MS: 0.99}


def windows(scope: Scope, *columns: Any) -> Rows:
    """Windows of the rule's models and devices that ended lately: device, model, and columns."""
    series = TelemetrySeries
    query = (
        select(series.device_id, series.model, *columns)
        .join(ModelWindowRow, ModelWindowRow.series_id == series.id)
        .where(
            series.fleet_id == scope.fleet_id,
            series.device_id.in_(scope.ids()),
            ModelWindowRow.ended_at >= scope.ago(scope.spec.seconds),
        )
    )
    return query if scope.spec.model is None else query.where(series.model == scope.spec.model)


def counted(scope: Scope) -> Rows:
    """Requests, errors and refusals of each model on each device."""
    row = ModelWindowRow
    query = windows(scope, func.sum(row.requests), func.sum(row.errors), func.sum(row.rejected))
    return query.group_by(TelemetrySeries.device_id, TelemetrySeries.model)


def served(scope: Scope) -> Rows:
    """Models that answer requests on connected devices, as these said."""
    query = select(DeviceAttribute.device_id, DeviceAttribute.text).where(
        DeviceAttribute.fleet_id == scope.fleet_id,
        DeviceAttribute.name == "model",
        DeviceAttribute.device_id.in_(scope.ids()),
    )
    return query if scope.spec.model is None else query.where(DeviceAttribute.text == scope.spec.model)


def find_rates(scope: Scope) -> Findings:
    """Shares of requests that failed, or were refused; of few requests nothing is said."""
    found: Findings = {}
    for device_id, model, requests, errors, rejected in scope.session.execute(counted(scope)):
        hits, trials = (
            (rejected, requests + rejected)
            if scope.spec.metric is Metric.REJECTED_PERCENT
            else (errors, requests)
        )  # fmt: skip
        if trials >= scope.spec.least_requests:
            said = f"{hits} of {trials} requests"
            found[Subject(device_id, model)] = Found(100.0 * float(hits) / float(trials), said)
    return found


def find_throughput(scope: Scope) -> Findings:
    """Requests a second, also of models that serve and were asked nothing."""
    served_by = scope.session.execute(served(scope))
    found = {Subject(device_id, model): Found(0.0, "no requests") for device_id, model in served_by}
    for device_id, model, requests, _, _ in scope.session.execute(counted(scope)):
        found[Subject(device_id, model)] = Found(float(requests) / scope.spec.seconds, f"{requests} requests")
    return found


def find_latency(scope: Scope) -> Findings:
    """A percentile of all requests of a device; of few nothing is said."""
    sums: dict[Subject, dict[int, int]] = defaultdict(dict)
    for device_id, model, packed in _rows(scope, ModelWindowRow.latency):
        merge(sums[Subject(device_id, model)], unpack_latency(packed))
    found: Findings = {}
    for subject, buckets in sums.items():
        requests, seconds = sum(buckets.values()), percentile(buckets, QUANTILES[scope.spec.metric])
        if seconds is not None and requests >= scope.spec.least_requests:
            found[subject] = Found(1000.0 * seconds, f"over {requests} requests")
    return found


def find_accuracy(scope: Scope) -> Findings:
    """The share of rows whose label somebody sent that were right; of few nothing is said."""
    right: dict[Subject, int] = defaultdict(int)
    labelled: dict[Subject, int] = defaultdict(int)
    for device_id, model, packed in _rows(scope, ModelWindowRow.confusion):
        for label, predicted, count in unpack_cells(packed):
            labelled[Subject(device_id, model)] += count
            right[Subject(device_id, model)] += count if label == predicted else 0
    return {
        subject: Found(100.0 * right[subject] / total, f"{right[subject]} of {total} labelled rows")
        for subject, total in labelled.items()
        if total >= scope.spec.least_requests
    }


def _rows(scope: Scope, column: Any) -> Iterator[tuple[str, str, bytes]]:
    """Of many windows a part at a time is in memory."""
    for row in scope.session.execute(windows(scope, column).execution_options(yield_per=ROWS)):
        yield row[0], row[1], row[2]
