"""Where the server is timed: around every request, and around every statement of the database."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import Counter, Histogram
from sqlalchemy import Engine, event
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.protocol.logs import log_ids
from agent.protocol.trace import TraceParent, parse_traceparent
from fleet_server import spans
from fleet_server.instruments import Instruments
from fleet_server.otlp import SpanExporter

UNTRACED = frozenset({"/metrics", "/healthz", "/readyz"})  # asked all the time, and nobody waits for them
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OPERATIONS = frozenset({"select", "insert", "update", "delete", "copy", "begin"})
NO_ROUTE = "none"
OTHER = "other"
FAILED = 500


class RequestTimer:
    """ASGI middleware: counts and times requests by their route, never by their path, which clients choose.

    Args:
        app: what it stands before.
        instruments: that count.
    """

    def __init__(self, app: ASGIApp, instruments: Instruments) -> None:
        self._app = app
        self._instruments = instruments
        self._known: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}  # as bounded as labels are

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, code = time.perf_counter(), FAILED

        async def noting(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            method = scope["method"] if scope["method"] in METHODS else OTHER
            route = route_of(scope)
            counted, timed = self._of(method, route, code)
            counted.inc()
            timed.observe(time.perf_counter() - started)

    def _of(self, method: str, route: str, code: int) -> tuple[Counter, Histogram]:
        found = self._known.get((method, route, code))
        if found is None:
            counted = self._instruments.requests.labels(method, route, str(code))
            found = self._known[method, route, code] = (
                counted,
                self._instruments.request_seconds.labels(method, route),
            )
        return found


def route_of(scope: Scope) -> str:
    """The template that a request's path met, such as `/api/v1/devices/{device_id}`."""
    within = scope.get("fastapi", {}).get("effective_route_context")  # of a router that was included below a prefix
    route = within if within is not None else scope.get("route")
    return str(getattr(route, "path", None) or NO_ROUTE)


def time_statements(engine: Engine, instruments: Instruments) -> None:
    """Time every statement that goes over an engine."""

    @event.listens_for(engine, "before_cursor_execute")
    def _begins(_connection: Any, _cursor: Any, _text: str, _values: Any, context: Any, _many: Any) -> None:
        if context is not None:
            context.shoal_began = time.perf_counter()

    @event.listens_for(engine, "after_cursor_execute")
    def _ends(_connection: Any, _cursor: Any, text: str, _values: Any, context: Any, _many: Any) -> None:
        began = getattr(context, "shoal_began", None)
        if began is not None:
            operation = text[:16].lstrip().partition(" ")[0].lower()
            shown = operation if operation in OPERATIONS else OTHER
            instruments.statements.labels(shown).observe(time.perf_counter() - began)


class RequestTracer:
    """ASGI middleware: a span a request, within the one that its `traceparent` names; nothing while nothing is traced.

    Args:
        app: what it stands before; `state.spans` of the application is the exporter.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        exporter: SpanExporter | None = getattr(scope["app"].state, "spans", None) if "app" in scope else None
        if scope["type"] != "http" or exporter is None or scope["path"] in UNTRACED:
            await self._app(scope, receive, send)
            return
        around = parse_traceparent(Headers(scope=scope).get("traceparent", ""))
        trace_id = around.trace_id if around is not None else spans.new_trace_id()
        sampled = exporter.sampled(around, trace_id, scope["method"])
        own = TraceParent(trace_id, spans.new_span_id(), sampled=sampled)
        started, code = time.time(), FAILED

        async def noting(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            with spans.within(own), log_ids(trace_id=trace_id):
                await self._app(scope, receive, noting)
        finally:
            if sampled:
                exporter.export([_request_span(scope, own, around, started, code)])


def _request_span(scope: Scope, own: TraceParent, around: TraceParent | None, started: float, code: int) -> spans.Span:
    method = scope["method"] if scope["method"] in METHODS else OTHER
    return spans.Span(
        name=f"{method} {route_of(scope)}",
        trace_id=own.trace_id,
        span_id=own.span_id,
        parent_id=around.span_id if around is not None else "",
        started_at=started,
        ended_at=time.time(),
        kind=spans.Kind.SERVER,
        attributes={
            "http.request.method": method,
            "http.route": route_of(scope),
            "http.response.status_code": code,
            "shoal.request_id": str(scope.get("state", {}).get("request_id", "")),
        },
        problem=f"answered {code}" if code >= FAILED else "",
    )
