"""Spans and metrics by OTLP over HTTP, where the operator names a collector: the one place that knows OpenTelemetry.

Its libraries are an extra (`shoal[otel]`) and are imported where they are wanted. The variables of OpenTelemetry's own
specification hold: headers, certificates, compression, timeouts, sampler, and attributes of the resource.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from agent import __version__
from agent.protocol.trace import TraceParent
from fleet_server.errors import UnavailableError
from fleet_server.spans import Kind, Span

if TYPE_CHECKING:  # at run time only where a collector is named
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext

log = logging.getLogger(__name__)
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
QUEUE = 16_384  # spans that wait for the collector; more are dropped
TRUE = {"true", "1"}


@dataclass(frozen=True)
class Targets:
    """What is exported, and where to.

    Attributes:
        traces: whether spans are.
        metrics: whether metrics are.
        base: `http(s)://host:port` of the collector; empty where OpenTelemetry's own variables name it.
    """

    traces: bool
    metrics: bool
    base: str = ""

    def of(self, signal: str) -> str | None:
        """The address for `traces` or `metrics`; None where OpenTelemetry's own variables say it."""
        return f"{self.base.rstrip('/')}/v1/{signal}" if self.base else None


def targets(base: str | None, environment: Mapping[str, str], *, metrics: bool) -> Targets:
    """What is to be exported by a setting and by OpenTelemetry's variables. Pure.

    Metrics go only where somebody asks for them: what takes spans often takes nothing else.

    Args:
        base: of the setting.
        environment: with OpenTelemetry's variables.
        metrics: whether the setting asks for them.
    """
    if environment.get("OTEL_SDK_DISABLED", "").lower() in TRUE:
        return Targets(traces=False, metrics=False)
    anywhere = bool(base or environment.get(ENDPOINT))

    def wanted(signal: str, *, by_default: bool) -> bool:
        named = environment.get(f"OTEL_{signal}_EXPORTER", "")
        if named:
            return named == "otlp" and (anywhere or bool(environment.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")))
        return (anywhere and by_default) or bool(environment.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT"))

    return Targets(wanted("TRACES", by_default=True), wanted("METRICS", by_default=metrics), base or "")


def resource_of(service: str, instance: str = "") -> Resource:
    """Who says something, as OpenTelemetry has it.

    Raises:
        UnavailableError: when its libraries are not installed.
    """
    try:
        from opentelemetry.sdk.resources import Resource
    except ImportError as error:
        raise missing(error) from None
    named = {"service.instance.id": instance} if instance else {}
    return Resource.create({"service.name": service, "service.version": __version__, **named})


def missing(error: ImportError) -> UnavailableError:
    """OpenTelemetry's libraries are wanted, and are not there."""
    detail = f"traces or metrics by OTLP are wanted, and {error.name} is not installed: pip install 'shoal[otel]'"
    return UnavailableError("otel_missing", detail)


class SpanExporter:
    """Sends spans to a collector, many at a time, from a thread of its own; what it can't send is dropped.

    Args:
        address: of the collector, for traces; None where OpenTelemetry's variables name it.
        service: who makes the spans that name no other.
        instance: which of them.
        timeout_s: how long the collector may take for what is sent at once; None: as OpenTelemetry's variables say.

    Raises:
        UnavailableError: when OpenTelemetry's libraries are not installed.
    """

    def __init__(
        self, address: str | None, service: str, instance: str = "", *, timeout_s: float | None = None
    ) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise missing(error) from None
        self._service, self._own = service, resource_of(service, instance)
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler
        self._processor = BatchSpanProcessor(OTLPSpanExporter(address, timeout=timeout_s), max_queue_size=QUEUE)

    def sampled(self, parent: TraceParent | None, trace_id: str, name: str) -> bool:
        """Whether a span is recorded: as the one around it is, else as OTEL_TRACES_SAMPLER has it."""
        from opentelemetry import trace

        around = None
        if parent is not None:
            flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if parent.sampled else trace.TraceFlags.DEFAULT)
            context = trace.SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True,
                                        trace_flags=flags)  # fmt: skip
            around = trace.set_span_in_context(trace.NonRecordingSpan(context))
        return bool(self._sampler.should_sample(around, int(trace_id, 16), name).decision.is_sampled())

    def export(self, spans: Sequence[Span]) -> None:
        """Take spans that are over; returns at once."""
        for one in spans:
            self._processor.on_end(_readable(one, self._own if one.service == self._service else None))

    def close(self) -> None:
        """Send what waits, within a bound, and end."""
        self._processor.shutdown()


@lru_cache(maxsize=4096)
def _resource(service: str, instance: str) -> Resource:
    return resource_of(service, instance)


def _readable(span: Span, resource: Resource | None) -> ReadableSpan:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanKind, Status, StatusCode

    kinds = {
        Kind.INTERNAL: SpanKind.INTERNAL,
        Kind.SERVER: SpanKind.SERVER,
        Kind.CLIENT: SpanKind.CLIENT,
        Kind.PRODUCER: SpanKind.PRODUCER,
        Kind.CONSUMER: SpanKind.CONSUMER,
    }
    return ReadableSpan(
        name=span.name,
        context=_context(span.trace_id, span.span_id),
        parent=_context(span.trace_id, span.parent_id) if span.parent_id else None,
        resource=resource or _resource(span.service, span.instance),
        attributes=span.attributes,
        kind=kinds[span.kind],
        status=Status(StatusCode.ERROR, span.problem[:1000]) if span.problem else Status(),
        start_time=int(span.started_at * 1e9),
        end_time=int((span.started_at if span.ended_at is None else max(span.ended_at, span.started_at)) * 1e9),
        instrumentation_scope=InstrumentationScope("shoal", __version__),
    )


def _context(trace_id: str, span_id: str) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
