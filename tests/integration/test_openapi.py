"""The API's description is valid and complete, and what the server really answers fits it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from openapi_spec_validator import validate
from schemathesis.specs.openapi.checks import positive_data_acceptance

from fleet_server.access import policy
from fleet_server.app import create_app
from fleet_server.settings import Settings
from tests.fleet import LocalFleet

METHODS = {"get", "post", "put", "patch", "delete"}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server with one profile, and one agent's worth of nothing else."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        unlimited = {"RATE": "100000", "BURST": "100000"}
        fleet.start_server(
            **{f"SHOAL_{who}_{what}": value for who in ("REQUEST", "ANONYMOUS") for what, value in unlimited.items()}
        )
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx"})
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method, path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    validate(document)


def test_every_operation_says_what_it_does_and_how_it_fails(document: dict[str, Any]) -> None:
    names = []
    for method, path, operation in operations(document):
        where = f"{method} {path}"
        assert operation.get("summary"), where
        assert operation.get("description"), where
        assert operation.get("tags"), where
        names.append(operation["operationId"])
        for parameter in operation.get("parameters", []):
            described = parameter.get("description") or parameter["schema"].get("description")
            assert described, f"{where}: {parameter['name']}"
        if path.startswith("/api/v1"):
            expected = {"401", "403", "413", "422", "429", "500"} | (
                {"404"} if "{" in path and "artifacts" not in path else set()
            )
            assert expected - {"404"} <= set(operation["responses"]), where
            for status, response in operation["responses"].items():
                if status >= "400":
                    assert list(response["content"]) == ["application/problem+json"], f"{where} {status}"
    assert len(set(names)) == len(names)


def test_every_body_has_an_example_that_validates(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" not in content:
            continue
        name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        assert document["components"]["schemas"][name].get("examples"), f"{method} {path}: {name}"


SCHEMA = schemathesis.openapi.from_dict(create_app(Settings()).openapi())
# How many examples each caller sends of each operation.
CALLERS = {"server-wide": 5, "admin": 2, "releaser": 2, "operator": 2, "viewer": 2, "nobody": 2}
OPERATIONS: list[Any] = [found.ok() for found in SCHEMA.get_all_operations()]  # type: ignore[union-attr]

OPEN = {
    f"{method.upper()} {path}"
    for method, path, operation in operations(create_app(Settings()).openapi())
    if operation["operationId"] in policy.PUBLIC
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=[one.label for one in OPERATIONS])
def test_answers_fit_the_document(fleet: LocalFleet, operation: Any) -> None:
    """No 5xx, no undocumented status, no body outside its schema, bad input refused: as each role and as nobody."""
    for caller, examples in CALLERS.items():
        send(fleet, operation, caller, examples)


def send(fleet: LocalFleet, operation: Any, caller: str, examples: int) -> None:
    headers = authorization(fleet, caller)
    closed = caller == "nobody" and operation.path.startswith("/api/v1") and operation.label not in OPEN

    @hypothesis.settings(max_examples=examples, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=operation.as_strategy())
    def check(case: schemathesis.Case[Any]) -> None:
        # What fits the document may still be refused with 422: a cursor that is none, a target that selects nothing.
        answer = case.call_and_validate(base_url=fleet.url, headers=headers, excluded_checks=[positive_data_acceptance])
        # A method that there is not, or an address with a NUL, is refused before anybody asks who it is.
        assert not closed or answer.status_code in {400, 401, 405, 413, 422}

    check()


def authorization(fleet: LocalFleet, caller: str) -> dict[str, str]:
    """The header of a caller: a token of its own for each operation, for one of them is to log out."""
    if caller == "server-wide":
        return fleet.authorization
    if caller == "nobody":
        return {}
    made = fleet.post("/tokens", {"name": uuid.uuid4().hex, "role": caller})
    return {"Authorization": f"Bearer {made['token']}"}


def test_problems_of_unknown_paths_and_broken_bodies(fleet: LocalFleet) -> None:
    for answer in (
        fleet.api.get("/nowhere"),
        fleet.api.post("/rollouts", content=b"{", headers={"Content-Type": "application/json"}),
        fleet.api.put("/devices"),
    ):
        assert 400 <= answer.status_code < 500
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert httpx.get(f"{fleet.url}/redoc").status_code == 404
