"""Which trace requests belong to: that of the command line, or of the program that uses the client."""

from __future__ import annotations

import sys

import httpx

from fleet_server import spans


def add_traceparent(request: httpx.Request) -> None:
    """Name the span that a request is sent from, where there is one (W3C Trace Context)."""
    text = traceparent()
    if text:
        request.headers["traceparent"] = text


def traceparent() -> str:
    """Of the span that is open here; empty for none. OpenTelemetry's is asked where a program uses it."""
    own = spans.current()
    if own is not None:
        return own.text
    telemetry = sys.modules.get("opentelemetry.trace")
    context = telemetry.get_current_span().get_span_context() if telemetry is not None else None
    if context is None or not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
