"""Sign-in of people's browsers: a session's token in a cookie, which stands for a bearer token in what our pages ask.

A browser sends cookies along whoever made it ask, so a request that changes something counts as the person's own only
where the browser says that a page of this server sent it (Sec-Fetch-Site, or Origin of older ones).
"""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

SESSION = "shoal_session"
FLEET = "shoal_fleet"
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
LONGEST = 4096


class CookieSessions:
    """ASGI middleware: requests of our pages carry the bearer token that their cookie holds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if "authorization" not in headers and (scope["method"] in SAFE or _same_origin(headers, scope)):
                scope = _with_token(scope, headers)
        await self._app(scope, receive, send)


def _with_token(scope: Scope, headers: Headers) -> Scope:
    cookies = cookies_of(headers)
    token = cookies.get(SESSION)
    if not token or not (token.isascii() and token.isprintable()):
        return scope
    more = dict(scope, headers=list(scope["headers"]))
    sent = MutableHeaders(scope=more)
    sent["authorization"] = f"Bearer {token}"
    fleet = cookies.get(FLEET)
    if fleet and "x-shoal-fleet" not in headers and fleet.isascii() and fleet.isprintable():
        sent["x-shoal-fleet"] = fleet
    return more


def cookies_of(headers: Headers) -> dict[str, str]:
    """The cookies of a request; none where they can't be read."""
    text = headers.get("cookie", "")
    if len(text) > LONGEST:
        return {}
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(text).items()}
    except CookieError:
        return {}


def _same_origin(headers: Headers, scope: Scope) -> bool:
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    return headers.get("origin") == f"{scope['scheme']}://{headers.get('host', '')}"


def sign_in(answer: Response, token: str, *, secure: bool, seconds: int) -> None:
    """Have a browser keep a token."""
    answer.set_cookie(SESSION, token, max_age=seconds, httponly=True, samesite="lax", secure=secure, path="/")


def sign_out(answer: Response) -> None:
    """Have a browser forget it."""
    for name in (SESSION, FLEET):
        answer.delete_cookie(name, httponly=True, samesite="lax", path="/")


def choose_fleet(answer: Response, fleet: str, *, secure: bool) -> None:
    """Have a browser act in a fleet from now on."""
    answer.set_cookie(FLEET, fleet, httponly=True, samesite="lax", secure=secure, path="/")
