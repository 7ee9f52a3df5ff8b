"""Every call of the SDK is one that the API's description has: its path, its method and its parameters."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fleet_server.sdk
from fleet_server.sdk import Client
from tests.api_document import document

METHODS = {
    "get": "get", "get_tagged": "get", "items": "get", "read": "get", "download": "get", "follow": "get",
    "post": "post", "put": "put", "patch": "patch", "delete": "delete",
}  # fmt: skip
PAGED = {"cursor", "limit"}


@pytest.fixture(scope="module")
def operations() -> dict[tuple[str, str], dict[str, Any]]:
    """By method and path, names in the path left out."""
    return {
        (method, re.sub(r"\{[^}]*\}", "{}", path)): operation
        for path, item in document()["paths"].items()
        for method, operation in item.items()
    }


def calls() -> Iterator[tuple[str, str, str, set[str], set[str]]]:
    """Where each call is, its method and path, the names of its parameters, and the literal keys of its body."""
    for file in sorted(Path(fleet_server.sdk.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            name, arguments = node.func.attr, list(node.args)
            if name in {"_again", "_call", "_request", "stream"}:
                method = getattr(arguments.pop(0), "value", None)
            else:
                method = METHODS.get(name)
            path = path_of(arguments[0]) if arguments else None
            if not isinstance(method, str) or path is None:
                continue
            own = {*inspect.signature(getattr(Client, name)).parameters} if hasattr(Client, name) else set()
            own -= {"parameters"}
            known = {one.arg for one in node.keywords if one.arg} - own - {"content", "headers", "timeout", "params"}
            known |= {key for one in node.keywords if one.arg == "params" for key in keys(one.value)}
            body = keys(arguments[1]) if len(arguments) > 1 and method != "get" else set()
            yield f"{file.name}:{node.lineno}", method.lower(), path, known, body


def path_of(node: ast.expr) -> str | None:
    """A path that is written here, what is put into it as `{}`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found = node.value
    elif isinstance(node, ast.JoinedStr):
        found = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    else:
        return None
    return f"/api/v1{found}" if found.startswith("/") else None


def keys(node: ast.expr) -> set[str]:
    """Keys of the dicts that are written in an expression, the outermost only."""
    if isinstance(node, ast.Dict):
        return {str(key.value) for key in node.keys if isinstance(key, ast.Constant)}
    if isinstance(node, ast.Call):
        return {key for one in node.args for key in keys(one)}
    return set()


def fields(operation: dict[str, Any]) -> set[str]:
    """Fields that a body of an operation may have."""
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    name = schema["$ref"].rpartition("/")[2]
    return set(document()["components"]["schemas"][name]["properties"])


def test_every_call_is_described(operations: dict[tuple[str, str], dict[str, Any]]) -> None:
    found = list(calls())
    assert len(found) >= 20, "the calls are found"
    for where, method, path, parameters, body in found:
        assert (method, path) in operations, f"{where}: the API has no {method.upper()} {path}"
        operation = operations[method, path]
        known = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"}
        assert parameters <= known, f"{where}: {path} takes no {sorted(parameters - known)}"
        if body:
            strange = body - fields(operation)
            assert not strange, f"{where}: the body of {path} has no {sorted(strange)}"


def test_bodies_and_parameters_are_looked_at() -> None:
    found = {(path, method): (parameters, body) for _, method, path, parameters, body in calls()}
    assert found["/api/v1/models/{}/infer", "post"][0] == {"version", "target", "timeout_s"}
    assert found["/api/v1/gate-runs", "post"][1] == {"version", "profile", "devices"}
    assert found["/api/v1/variants", "get"][0] >= {"version"}
