"""Headers that tell browsers what an answer may do: nothing, unless it says so itself."""

from __future__ import annotations

from functools import cache

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
    return _headers(scope["path"].startswith("/api/"), scope["scheme"] == "https")


def _headers(of_api: bool, over_tls: bool) -> dict[str, str]:  # noqa: FBT001
    headers = dict(_ALWAYS)
    if of_api:
        headers["Cache-Control"] = "no-store"
    if over_tls:
        headers["Strict-Transport-Security"] = "max-age=31536000"
    return headers


@cache
def _raw(of_api: bool, over_tls: bool) -> list[tuple[bytes, bytes]]:  # noqa: FBT001
    return [(name.lower().encode(), value.encode()) for name, value in _headers(of_api, over_tls).items()]


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
                headers = list(message.get("headers", ()))
                present = {name for name, _ in headers}
                added = _raw(scope["path"].startswith("/api/"), scope["scheme"] == "https")
                message = {**message, "headers": headers + [one for one in added if one[0] not in present]}
            await send(message)

        await self._app(scope, receive, with_headers)
