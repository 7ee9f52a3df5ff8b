"""Headers that tell browsers what an answer may do: nothing, unless it says so itself."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NOTHING = "default-src 'none'; frame-ancestors 'none'"
_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": NOTHING,
}


def secure_headers(scope: Scope) -> dict[str, str]:
    """The headers of an answer to a request.

    Args:
        scope: of the request: answers of the API are kept by nobody, and over TLS (RFC 6797) no plain HTTP follows.
    """
    headers = dict(_ALWAYS)
    if scope["path"].startswith("/api/"):
        headers["Cache-Control"] = "no-store"
    if scope["scheme"] == "https":
        headers["Strict-Transport-Security"] = "max-age=31536000"
    return headers


class SecureHeaders:
    """ASGI middleware: adds the headers that an answer does not set itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = MutableHeaders(scope=message)
                for name, value in secure_headers(scope).items():
                    present.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)
