"""Where the server is timed: around every request, and around every statement of the database."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Engine, event
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleet_server.instruments import Instruments

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
            self._instruments.requests.labels(method, route, str(code)).inc()
            self._instruments.request_seconds.labels(method, route).observe(time.perf_counter() - started)


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
