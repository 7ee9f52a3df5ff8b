"""The API's description: problem responses, stable operation names, and examples that can be tried as they are."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from fleet_server.schemas import Problem

_MEANINGS = {
    400: ("Bad request", "bad_body", "the body can't be read: send JSON in UTF-8"),
    401: ("Not authenticated", "not_authenticated", "send `Authorization: Bearer <token>`"),
    403: ("Not allowed", "role_needed", "this needs the role releaser in fleet 'default', and token/ci has operator"),
    404: ("Not found", "version_not_found", "there is no version 'mnist@9'; the newest is mnist@2"),
    409: ("Conflict", "device_busy", "camera-01 still in rollout 01a2…: wait, abort it, or supersede it"),
    412: ("Precondition failed", "changed_since", "If-Match: it has been changed since you read it: read it again"),
    413: ("Too large", "upload_too_large", "an upload may have 2048 MiB (SHOAL_UPLOAD_MAX_MB)"),
    416: ("Range not satisfiable", "range", "there are 11042 bytes: ask for a range of these"),
    422: ("The request is not valid", "invalid", "stages: the last stage's percent must be 100"),
    429: ("Too many requests", "too_many_guesses", "too many wrong passwords: try again in 4 s"),
    500: ("The server failed", "internal", "something unexpected happened; the server's log has it under this id"),
    503: ("Not available now", "artifact_store", "the artifact store does not answer: try again soon"),
}


BEARER = """\
A service token (`shoal token create`), that of a session (`POST /api/v1/login`), or an ID token of the OpenID provider
(`GET /api/v1/login`), where there is one. It acts in one fleet; one that may
act in several names another with the header `X-Shoal-Fleet`.
"""
PUBLIC: dict[str, Any] = {"security": []}  # `openapi_extra` of an operation that needs no token


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for problem documents of these statuses."""
    return {status: _response(status) for status in statuses}


def _response(status: int) -> dict[str, Any]:
    title, code, detail = _MEANINGS[status]
    example = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": "3f0c7d0c1f6e4b5c9a7f1e2d3c4b5a69",
        "problems": [{"field": "stages", "detail": detail}] if status == 422 else [],
    }
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": title, "content": {"application/problem+json": {"schema": schema, "example": example}}}


def operation_name(route: APIRoute) -> str:
    """The name of an operation is that of its function: stable for clients that are generated."""
    return route.name


def describe(app: FastAPI) -> None:
    """Let the application describe itself with the problem shape among its schemas."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
                license_info=app.license_info,
            )
            schemas = made["components"]["schemas"]
            problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs", {}))
            schemas["Problem"] = problem
            made["components"]["securitySchemes"] = {
                "token": {"type": "http", "scheme": "bearer", "description": BEARER}
            }
            for item in made["paths"].values():
                _describe_links(item)
            made["security"] = [{"token": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _describe_links(item: dict[str, Any]) -> None:
    """A list's answer has a `Link` header to the next page."""
    for operation in item.values():
        if any(parameter["name"] == "cursor" for parameter in operation.get("parameters", [])):
            header = {
                "description": 'The next page, with `rel="next"` (RFC 8288); absent on the last one.',
                "schema": {"type": "string"},
                "example": '</api/v1/devices?limit=50&cursor=Y2FtZXJhLTAx>; rel="next"',
            }
            operation["responses"]["200"]["headers"] = {"Link": header}
