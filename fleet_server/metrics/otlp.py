"""What `GET /metrics` says, by OTLP: the same names and numbers, pushed now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

from agent import __version__
from fleet_server.otlp import missing, resource_of
from fleet_server.ticker import Ticker

if TYPE_CHECKING:  # at run time only where a collector is named
    from opentelemetry.sdk.metrics.export import HistogramDataPoint, Metric, MetricsData, NumberDataPoint

log = logging.getLogger(__name__)
SKIPPED = ("_created",)


class MetricsPusher:
    """The thread that sends them.

    Args:
        registry: what is sent.
        address: of the collector, for metrics; None where OpenTelemetry's variables name it.
        instance: of this server.
        every_s: seconds between two.

    Raises:
        UnavailableError: when OpenTelemetry's libraries are not installed.
    """

    def __init__(self, registry: CollectorRegistry, address: str | None, instance: str, every_s: float) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        except ImportError as error:
            raise missing(error) from None
        self._registry = registry
        self._resource = resource_of("shoal-server", instance)
        self._started_ns = time.time_ns()
        self._exporter = OTLPMetricExporter(address)
        self._ticker = Ticker("metrics-pusher", self._push, every_s)

    def start(self) -> None:
        """Begin to send."""
        self._ticker.start()

    def stop(self) -> None:
        """Send once more, and end."""
        self._ticker.stop()
        self._ticker.call()
        self._exporter.shutdown()

    def _push(self) -> None:
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        found = list(metrics_of(self._registry.collect(), self._started_ns, time.time_ns()))
        scope = ScopeMetrics(InstrumentationScope("shoal", __version__), found, "")
        data: MetricsData = MetricsData([ResourceMetrics(self._resource, [scope], "")])
        self._exporter.export(data)


def metrics_of(families: Iterable[Family], started_ns: int, now_ns: int) -> Iterator[Metric]:
    """Prometheus' families as OpenTelemetry's metrics: counters as sums, gauges, and histograms with their buckets.

    Args:
        families: as a registry collects them.
        started_ns: since when counters count, in nanoseconds of Unix time.
        now_ns: when they were collected.
    """
    from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Histogram, Metric, Sum

    for family in families:
        samples = [one for one in family.samples if not one.name.endswith(SKIPPED)]
        if family.type == "histogram":
            points = _histogram_points(samples, started_ns, now_ns)
            data: Gauge | Sum | Histogram = Histogram(points, AggregationTemporality.CUMULATIVE)
        elif family.type == "counter":
            data = Sum(_points(samples, started_ns, now_ns), AggregationTemporality.CUMULATIVE, is_monotonic=True)
        else:
            data = Gauge(_points(samples, started_ns, now_ns))
        if data.data_points:
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield Metric(name, family.documentation, "", data)


def _points(samples: Iterable[Sample], started_ns: int, now_ns: int) -> list[NumberDataPoint]:
    from opentelemetry.sdk.metrics.export import NumberDataPoint

    return [NumberDataPoint(one.labels, started_ns, now_ns, float(one.value)) for one in samples]


def _histogram_points(samples: Iterable[Sample], started_ns: int, now_ns: int) -> list[HistogramDataPoint]:
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    by_labels: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for one in samples:
        labels = {name: value for name, value in one.labels.items() if name != "le"}
        kept = by_labels.setdefault(tuple(sorted(labels.items())), {})
        kept[one.labels.get("le") or one.name.rpartition("_")[2]] = one.value
    points = []
    for key, kept in by_labels.items():
        total, count = kept.pop("sum"), int(kept.pop("count"))
        bounds = sorted(kept, key=float)
        below = [int(kept[bound]) for bound in bounds]
        counts = [number - before for number, before in zip(below, [0, *below], strict=False)]
        points.append(
            HistogramDataPoint(
                attributes=dict(key),
                start_time_unix_nano=started_ns,
                time_unix_nano=now_ns,
                count=count,
                sum=total,
                bucket_counts=counts,
                explicit_bounds=[float(bound) for bound in bounds if bound != "+Inf"],
                min=0.0,
                max=0.0,
            )
        )
    return points
