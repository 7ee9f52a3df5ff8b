"""Every error as a problem document (RFC 9457) with a stable `code`, a remedy, and the id the log has it under."""

from __future__ import annotations

import logging
import math
import re
import secrets
from functools import lru_cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, IntegrityError, OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.protocol.logs import log_ids
from fleet_server.addresses import is_loopback
from fleet_server.errors import FleetError, InProgressError, RangeError, TooManyRequestsError
from fleet_server.secure_headers import secure_headers

log = logging.getLogger(__name__)
SHOWN = 20
OWN_BOUND = re.compile(r"/api/v1/(uploads|models/[^/]+/infer)")  # files and tensors
_HOST = re.compile(r"\[?([^\[\]]+?)\]?(?::\d+)?")
_SAID = {
    "extra_forbidden": "there is no such field: mend its name, or leave it out",
    "missing": "it is needed: add it",
    "model_attributes_type": "send a JSON object, with `Content-Type: application/json`",
    "dict_type": "send a JSON object",
}


def add_problems(app: FastAPI, *, loopback_only: bool, body_limit: int) -> None:
    """Give the application its error handlers, and every request its id.

    Args:
        app: where to add them.
        loopback_only: refuse requests for other hosts than this one: a web page could reach the API through a name
            that resolves to loopback.
        body_limit: in bytes, of what is no upload. Routers hold it too, for bodies that do not say how long they are.
    """
    app.add_exception_handler(FleetError, _fleet)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(IntegrityError, _changed_meanwhile)
    app.add_exception_handler(DataError, _not_storable)
    app.add_exception_handler(OperationalError, _database_away)
    app.add_exception_handler(Exception, _unexpected)

    app.add_middleware(EveryRequest, loopback_only=loopback_only, body_limit=body_limit)


class EveryRequest:
    """ASGI middleware: a request has an id, which its answer says; one that this server can't take goes no further.

    Args:
        app: what it stands before.
        loopback_only: as of `add_problems`.
        body_limit: as of `add_problems`.
    """

    def __init__(self, app: ASGIApp, *, loopback_only: bool, body_limit: int) -> None:
        self._app = app
        self._loopback_only = loopback_only
        self._body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        told = (b"x-request-id", request_id.encode())

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message.get("headers", ()) if pair[0] != told[0]]
                message = {**message, "headers": [*kept, told]}
            await send(message)

        with log_ids(request_id=request_id):
            refusal = _refusal(scope, loopback_only=self._loopback_only, body_limit=self._body_limit)
            await (refusal or self._app)(scope, receive, telling)


@lru_cache(maxsize=256)
def _is_own(host: bytes) -> bool:
    found = _HOST.fullmatch(host.decode("latin-1"))
    return found is not None and is_loopback(found[1].lower())


def _refusal(scope: Scope, *, loopback_only: bool, body_limit: int) -> Response | None:
    host = declared = b""
    for name, value in reversed(scope["headers"]):  # of several the first counts
        if name == b"host":
            host = value
        elif name == b"content-length":
            declared = value
    if loopback_only and not _is_own(host):
        detail = "this server is for its own machine only: ask for it as localhost or 127.0.0.1, or set SHOAL_HOST"
        return _problem(Request(scope), status=400, title="Bad request", code="unknown_host", detail=detail)
    if declared.isdigit() and int(declared[:20]) > body_limit and not OWN_BOUND.fullmatch(scope["path"]):
        return _too_large(Request(scope))
    request, asked = Request(scope), scope["query_string"]
    if "\0" in scope["path"] or (b"%00" in asked and "\0" in "".join(request.query_params.values())):
        detail = "the address holds a NUL character (%00), which no name has: leave it out"
        return _problem(request, status=422, title="The request is not valid", code="invalid", detail=detail)
    return None


def _problem(
    request: Request,
    *,
    status: int,
    title: str,
    code: str,
    detail: str,
    problems: list[dict[str, str]] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    request_id = getattr(request.state, "request_id", "")
    log.info("request %s: %s %r: %d %s", request_id, request.method, request.url.path, status, code)
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": request_id,
        "problems": problems or [],
    }
    # Answers to defects are made outside the middleware that adds these to the others.
    headers = {**secure_headers(request.scope), **(headers or {}), "X-Request-Id": request_id}
    return JSONResponse(body, status_code=status, media_type="application/problem+json", headers=headers)


def _fleet(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FleetError)
    return _problem(
        request,
        status=error.status,
        title=error.title,
        code=error.code,
        detail=error.detail,
        problems=[{"field": one.field, "detail": one.detail} for one in error.problems],
        headers=_headers(error),
    )


def _headers(error: FleetError) -> dict[str, str]:
    if isinstance(error, (TooManyRequestsError, InProgressError)):
        return {"Retry-After": str(math.ceil(error.retry_after_s))}
    if isinstance(error, RangeError):
        return {"Content-Range": f"bytes */{error.size}"}
    return {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}


def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = []
    for one in error.errors()[:SHOWN]:
        place = [str(part) for part in one["loc"] if part not in {"body", "query", "path"}]
        said = _SAID.get(one["type"], one["msg"].removeprefix("Value error, "))
        # A field's name is the client's text, and may hold what is no text.
        field = ".".join(place).encode(errors="replace").decode() or "body"
        problems.append({"field": field, "detail": said})
    detail = "; ".join(f"{one['field']}: {one['detail']}" for one in problems[:5])
    return _problem(
        request, status=422, title="The request is not valid", code="invalid", detail=detail, problems=problems
    )


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:
        detail = "the body can't be read: send JSON in UTF-8, not too deeply nested, with no endless numbers"
        return _problem(request, status=400, title="Bad request", code="bad_body", detail=detail)
    if error.status_code == 413:
        return _too_large(request)
    title = str(error.detail)
    detail = f"{request.method} {request.url.path}: {title}; see /docs for what there is"
    code = title.lower().replace(" ", "_")
    return _problem(
        request, status=error.status_code, title=title, code=code, detail=detail, headers=dict(error.headers or {})
    )


def _too_large(request: Request) -> JSONResponse:
    detail = "the body is too large (SHOAL_REQUEST_MAX_MB): send less; files go to /api/v1/uploads"
    return _problem(request, status=413, title="Too large", code="body_too_large", detail=detail)


def _changed_meanwhile(request: Request, error: Exception) -> JSONResponse:
    """Two requests met: the database let one of them pass."""
    log.info("request %s lost a race: %s", request.state.request_id, error)
    detail = "another request changed the same thing at the same time: look what is there now, then try again"
    return _problem(request, status=409, title="Conflict", code="changed_meanwhile", detail=detail)


def _not_storable(request: Request, error: Exception) -> JSONResponse:
    log.info("request %s holds what the database can't: %s", request.state.request_id, error)
    detail = "a value can't be stored (a NUL character, or a number out of range): mend it"
    return _problem(request, status=422, title="The request is not valid", code="invalid", detail=detail)


def _database_away(request: Request, error: Exception) -> JSONResponse:
    log.error("request %s: the database does not answer: %s", request.state.request_id, error)
    detail = "the database does not answer, or is busy: try again soon; the server's log says more"
    return _problem(request, status=503, title="Not available now", code="database", detail=detail)


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    request_id = getattr(request.state, "request_id", "")
    log.error("request %s: %s %r failed", request_id, request.method, request.url.path, exc_info=error)
    detail = "something unexpected happened; the server's log has it under this request_id"
    return _problem(request, status=500, title="The server failed", code="internal", detail=detail)
