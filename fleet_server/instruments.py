"""What the server counts of itself as it happens, for `/metrics`. It knows no table and no HTTP.

Each server has its own registry: two of them may run in one process. Names follow Prometheus' conventions: base units,
`_total` for what only grows. Every label has a bounded set of values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from agent import __version__

REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
DATABASE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10.0)
HANDLING_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 5.0)


class Instruments:
    """Counters, gauges and histograms, and the registry that holds them. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)
        info = self._gauge("shoal_server_info", "Always 1; its label is the version that runs.", "version")
        info.labels(__version__).set(1)
        self.requests = self._counter("shoal_http_requests", "Requests that were answered.", "method", "route", "code")
        self.request_seconds = self._histogram(
            "shoal_http_request_duration_seconds", "How long answers took, their bodies included.", REQUEST_S,
            "method", "route",
        )  # fmt: skip
        self.statements = self._histogram(
            "shoal_database_statement_duration_seconds", "How long the database took for a statement.", DATABASE_S,
            "operation",
        )  # fmt: skip
        self.messages = self._counter("shoal_device_messages", "Messages of devices that were handled.", "kind")
        self.refused = self._counter(
            "shoal_device_messages_refused", "Messages of devices that could not be read, or were not theirs to send."
        )
        self.dropped = self._counter(
            "shoal_device_messages_dropped",
            "Messages of devices that found no room: their device sent more than its share, or the server is behind.",
            "reason",
        )
        self.handling = self._histogram(
            "shoal_device_message_handling_seconds",
            "How long a group of messages of one kind took.",
            HANDLING_S,
            "kind",
        )
        self.batches = self._counter("shoal_telemetry_batches", "Batches of telemetry that were acknowledged.")
        self.windows = self._counter("shoal_telemetry_windows", "Windows of models in those batches.")
        self.inferences = self._counter(
            "shoal_telemetry_requests", "Inference requests on devices that those windows count."
        )
        for reason in ("share", "full"):
            self.dropped.labels(reason)

    def watch(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Say, whenever somebody asks, what a function says then; it must be quick."""
        self._gauge(name, meaning).set_function(value)

    @contextmanager
    def timed_handling(self, kind: str, count: int) -> Iterator[None]:
        """Messages of one kind that are handled together, whatever becomes of them."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.messages.labels(kind).inc(count)
            self.handling.labels(kind).observe(time.perf_counter() - started)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(name, meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, meaning, labels, registry=self.registry, buckets=buckets)
