"""The API's description is valid and complete, and what the server really answers fits it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from openapi_spec_validator import validate
from schemathesis.specs.openapi.checks import positive_data_acceptance

from fleet_server.app import create_app
from fleet_server.settings import Settings
from tests.fleet import LocalFleet

METHODS = {"get", "post", "put", "patch", "delete"}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server with one profile, and one agent's worth of nothing else."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
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
            expected = {"401", "422", "500"} | ({"404"} if "{" in path and "artifacts" not in path else set())
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
OPERATIONS: list[Any] = [found.ok() for found in SCHEMA.get_all_operations()]  # type: ignore[union-attr]


@pytest.mark.parametrize("operation", OPERATIONS, ids=[one.label for one in OPERATIONS])
def test_answers_fit_the_document(fleet: LocalFleet, operation: Any) -> None:
    """No 5xx, no undocumented status, no body outside its schema, bad input refused."""

    @hypothesis.settings(max_examples=15, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=operation.as_strategy())
    def check(case: schemathesis.Case[Any]) -> None:
        # What fits the document may still be refused with 422: a cursor that is none, a target that selects nothing.
        case.call_and_validate(
            base_url=fleet.url, headers=fleet.authorization, excluded_checks=[positive_data_acceptance]
        )

    check()


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
