"""A small collector: takes OTLP over HTTP as collectors do, and keeps what came, read by OpenTelemetry's own schema."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Received:
    """A span that came."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start: float
    end: float
    attributes: dict[str, Any]
    failed: bool


@dataclass
class Collector:
    """What came so far."""

    url: str
    spans: list[Received] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)  # the newest of each name
    refused: int = 0

    def of(self, trace_id: str) -> list[Received]:
        return [one for one in self.spans if one.trace_id == trace_id]


@contextmanager
def collector(*, refuse: bool = False) -> Iterator[Collector]:
    """One on a free port of loopback; with `refuse` it answers 400 to everything."""
    found = Collector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if refuse:
                found.refused += 1
            elif self.path == "/v1/traces":
                _take_spans(found, body)
            elif self.path == "/v1/metrics":
                _take_metrics(found, body)
            self.send_response(400 if refuse else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()


def _take_spans(found: Collector, body: bytes) -> None:
    for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = _attributes(of_resource.resource.attributes)["service.name"]
        for scope in of_resource.scope_spans:
            for one in scope.spans:
                found.spans.append(
                    Received(
                        one.name, service, one.trace_id.hex(), one.span_id.hex(), one.parent_span_id.hex(), one.kind,
                        one.start_time_unix_nano / 1e9, one.end_time_unix_nano / 1e9, _attributes(one.attributes),
                        one.status.code == 2,
                    )
                )  # fmt: skip


def _take_metrics(found: Collector, body: bytes) -> None:
    for of_resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
        for scope in of_resource.scope_metrics:
            found.metrics |= {one.name: one for one in scope.metrics}


def _attributes(pairs: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in pairs}
