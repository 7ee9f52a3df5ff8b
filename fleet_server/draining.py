"""A server that is about to end: it still answers, says that it is not ready, and lets go of connections one by one.

Whoever balances requests between servers sends it no more when `/readyz` says so; a connection that is kept open is
closed behind its next answer, not before a request.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Drain:
    """Whether the server is about to end; said by the handler of signals, asked by requests."""

    def __init__(self) -> None:
        self.begun = False


class ClosedConnections:
    """ASGI middleware: once the server drains, each answer is the last of its connection."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and self._drain.begun:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, receive, watched)
