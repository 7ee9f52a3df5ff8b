"""The API's description: problem responses, stable operation names, and examples that can be tried as they are."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from fleet_server.idempotency import HEADER, REPLAYED, STREAMED
from fleet_server.preconditions import EXAMPLE
from fleet_server.problem_codes import ALWAYS, CODES, OF_CHANGES, OF_CONDITIONAL, OF_KEYED, OF_LISTS, TITLES
from fleet_server.schemas import Problem

BEARER = """\
A service token (`shoal token create`), that of a session (`POST /api/v1/login`), or an ID token of the OpenID provider
(`GET /api/v1/login`), where there is one. It acts in one fleet; one that may
act in several names another with the header `X-Shoal-Fleet`.
"""
PUBLIC: dict[str, Any] = {"security": []}  # `openapi_extra` of an operation that needs no token


ETAG = "The answer's ETag: give it back as `If-None-Match`, or as the `If-Match` of a change."


def problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for problem documents with these codes (`fleet_server.problem_codes`)."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(CODES[code][0], []).append(code)
    return {status: _response(status, found) for status, found in sorted(by_status.items())}


def _response(status: int, codes: list[str]) -> dict[str, Any]:
    examples = {code: {"summary": CODES[code][1], "value": _example(status, code)} for code in codes}
    of_codes = {"properties": {"code": {"enum": codes}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/Problem"}, of_codes]}
    said: dict[str, Any] = {"description": TITLES[status]}
    said["content"] = {"application/problem+json": {"schema": schema, "examples": examples}}
    if status == 429 or "request_in_progress" in codes:
        said["headers"] = {"Retry-After": _header("Seconds after which to try again.", "1")}
    return said


def _example(status: int, code: str) -> dict[str, Any]:
    detail = CODES[code][1]
    field = detail.partition(":")[0]
    return {
        "type": "about:blank",
        "title": TITLES[status],
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": "3f0c7d0c1f6e4b5c9a7f1e2d3c4b5a69",
        "problems": [{"field": field, "detail": detail}] if status == 422 and ":" in detail else [],
    }


def _header(description: str, example: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}, "example": example}


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
            for path, item in made["paths"].items():
                if path.startswith("/api/v1"):
                    for method, operation in item.items():
                        _describe_problems(method, operation)
                        _describe_headers(method, operation)
            made["security"] = [{"token": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _describe_problems(method: str, operation: dict[str, Any]) -> None:
    """Beside the codes that were declared, those that follow from what an operation is."""
    names = {parameter["name"] for parameter in operation.get("parameters", [])}
    codes = list(ALWAYS)
    codes += OF_LISTS if "cursor" in names else ()
    codes += OF_CHANGES if method != "get" else ()
    codes += OF_KEYED if _is_keyed(method, operation) else ()
    codes += OF_CONDITIONAL if "if-match" in names else ()
    for status, response in operation["responses"].items():
        if status >= "400":
            codes += response.get("content", {}).get("application/problem+json", {}).get("examples", {})
    kept = {status: found for status, found in operation["responses"].items() if status < "400"}
    said = {str(status): found for status, found in problems(*dict.fromkeys(codes)).items()}
    operation["responses"] = kept | said


def _is_keyed(method: str, operation: dict[str, Any]) -> bool:
    return method == "post" and operation["operationId"] not in STREAMED and operation.get("security") != []


def _describe_headers(method: str, operation: dict[str, Any]) -> None:
    """Headers that the API's routes take and give alike: `fleet_server.routes`, `idempotency` and `preconditions`."""
    parameters = operation.setdefault("parameters", [])
    listed = any(one["name"] == "cursor" for one in parameters)
    good = next(found for status, found in operation["responses"].items() if status < "300")
    given: dict[str, Any] = {}
    if listed:
        said = 'The next page, with `rel="next"` (RFC 8288); absent on the last one.'
        given["Link"] = _header(said, '</api/v1/devices?limit=50&cursor=WyJpZCIsImNhbS0xIiwiY2FtLTEiXQ>; rel="next"')
    if method == "get" and "application/json" in good.get("content", {}):
        given["ETag"] = _header(ETAG, EXAMPLE)
        said = "304 without a body where the answer still has this ETag (RFC 9110)."
        parameters.append(_parameter("If-None-Match", said, EXAMPLE))
        not_modified = {"description": "Not modified", "headers": {"ETag": _header(ETAG, EXAMPLE)}}
        operation["responses"]["304"] = not_modified
    if _is_keyed(method, operation):
        said = "Random, new for each request: one that is sent twice acts once, and is answered alike (IETF draft)."
        parameters.append(_parameter(HEADER, said, '"8e03978e-40d5-43e8-bc93-6894a57f9324"'))
        given[REPLAYED] = _header("`true` when this was answered before, and is the same answer again.", "true")
    if given:
        good["headers"] = {**good.get("headers", {}), **given}
    if not parameters:
        del operation["parameters"]


def _parameter(name: str, description: str, example: str) -> dict[str, Any]:
    schema = {"type": "string", "maxLength": 1024}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema,
            "example": example}  # fmt: skip
