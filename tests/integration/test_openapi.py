"""The API's description is valid and complete, and what the server really answers fits it."""

from __future__ import annotations

import ast
import copy
import functools
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from openapi_spec_validator import validate
from schemathesis.specs.openapi.checks import positive_data_acceptance

import fleet_server
from fleet_server import errors
from fleet_server.access import policy
from fleet_server.domain.tensors import read_request
from fleet_server.idempotency import STREAMED
from fleet_server.problem_codes import CODES
from fleet_server.schemas import PAGE_LIMIT, Problem
from tests.api_document import document
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


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method, path, operation)
        for path, item in document()["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


def test_the_document_is_valid_openapi() -> None:
    validate(document())


def test_every_operation_says_what_it_does_and_how_it_fails() -> None:
    names = []
    for method, path, operation in operations():
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


def test_every_problem_names_its_codes_with_an_example_of_each() -> None:
    for method, path, operation in operations():
        if not path.startswith("/api/v1"):
            continue
        for status, response in operation["responses"].items():
            if status < "400":
                continue
            content = response["content"]["application/problem+json"]
            codes = content["schema"]["allOf"][1]["properties"]["code"]["enum"]
            assert codes, f"{method} {path} {status}"
            assert list(content["examples"]) == codes
            for code, example in content["examples"].items():
                shown = Problem.model_validate(example["value"])
                assert (shown.code, str(shown.status)) == (code, status)


def test_what_things_of_a_kind_share_no_new_endpoint_can_lack() -> None:
    """Lists are paged and sorted; what is read has an ETag; a POST takes a key; who changes a thing takes its ETag."""
    readable = {path for method, path, operation in operations() if method == "get"}
    for method, path, operation in operations():
        if not path.startswith("/api/v1"):
            continue
        where, name = f"{method} {path}", operation["operationId"]
        parameters = {one["name"].lower(): one["schema"] for one in operation.get("parameters", [])}
        good = next(found for status, found in operation["responses"].items() if status < "300")
        schema = str(good.get("content", {}).get("application/json", {}).get("schema", ""))
        if method == "get" and schema:
            assert {"if-none-match"} <= parameters.keys(), where
            assert "ETag" in good["headers"], where
            assert "304" in operation["responses"], where
        if "Page_" in schema:
            assert {"cursor", "limit", "sort"} <= parameters.keys(), where
            assert parameters["limit"]["maximum"] == PAGE_LIMIT, where
            assert parameters["sort"]["default"] in parameters["sort"]["enum"], where
            assert "Link" in good["headers"], where
            assert "bad_cursor" in codes_of(operation), where
        elif method == "get":
            assert "array" not in schema, f"{where}: a list without pages"
        if method == "post" and name not in STREAMED and name not in policy.PUBLIC:
            assert "idempotency-key" in parameters, where
            assert "request_in_progress" in codes_of(operation), where
        thing = path if method in {"patch", "put", "delete"} else path.rpartition("/")[0]
        if name in {"create_version", "command_device", "add_signatures", "make_key", "infer_model"}:
            continue  # made below what they belong to, or a question; signatures name the version they replace
        if (method in {"patch", "put", "delete"} or (method == "post" and "{" in path)) and method != "get":
            assert thing in readable, f"{where}: {thing} can't be read"
            assert "if-match" in parameters, where
            assert "changed_since" in codes_of(operation), where
        if "{" in path:
            assert any(code.endswith("_not_found") or code == "bad_ticket" for code in codes_of(operation)), where


def codes_of(operation: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    for status, response in operation["responses"].items():
        if status >= "400":
            schema = response["content"]["application/problem+json"]["schema"]
            found |= set(schema["allOf"][1]["properties"]["code"]["enum"])
    return found


# Raised while the server starts, or on the way of a message of a device.
NOT_ANSWERED = {
    *("state_dir", "broker", "mosquitto_missing", "broker_port_taken", "bad_broker_url", "ca", "ca_unusable"),
    *("ca_mismatch", "many_keys", "bad_pkcs11_uri", "bad_pkcs11_key", "bad_key", "bad_key_folder"),
    *("device_locked_out", "otel_missing", "servers"),
}


def test_every_code_that_is_raised_is_in_the_table() -> None:
    raised = set()
    root = Path(fleet_server.__file__).parent
    for path in root.rglob("*.py"):
        if path.relative_to(root).parts[0] in {"backup", "cli", "sdk"}:  # no endpoint leads there
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            first = node.args[0]
            if issubclass(getattr(errors, node.func.id, int), errors.FleetError) and isinstance(first, ast.Constant):
                raised.add(f"{first.value}_not_found" if node.func.id == "NotFoundError" else str(first.value))
    assert len(raised) > 80
    assert raised - NOT_ANSWERED <= set(CODES)


def test_every_body_has_an_example_that_validates() -> None:
    for method, path, operation in operations():
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" not in content:
            continue
        if operation["operationId"] == "infer_model":  # its shape is the Open Inference Protocol's
            assert read_request(json.dumps(content["application/json"]["example"]).encode(), None).rows == 2
            continue
        name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        assert document()["components"]["schemas"][name].get("examples"), f"{method} {path}: {name}"


# How many examples each caller sends of each operation.
SHORT = {"server-wide": 3, "admin": 1, "releaser": 1, "operator": 1, "viewer": 1, "nobody": 1}
LONG = {"server-wide": 25, "admin": 5, "releaser": 5, "operator": 5, "viewer": 5, "nobody": 5}
LABELS = {f"{method.upper()} {path}": operation["operationId"] for method, path, operation in operations()}
OPEN = {label for label, name in LABELS.items() if name in policy.PUBLIC}


@functools.cache
def schema_operations() -> dict[str, Any]:
    """Every operation as schemathesis has it."""
    schema = schemathesis.openapi.from_dict(copy.deepcopy(document()))
    found = [one.ok() for one in schema.get_all_operations()]  # type: ignore[union-attr]
    return {one.label: one for one in found}


def test_every_operation_is_tried() -> None:
    assert schema_operations().keys() == LABELS.keys()


@pytest.mark.parametrize("callers", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
@pytest.mark.parametrize("label", LABELS)
def test_answers_fit_the_document(fleet: LocalFleet, label: str, callers: dict[str, int]) -> None:
    """No 5xx, no undocumented status, no body outside its schema, bad input refused: as each role and as nobody."""
    operation = schema_operations()[label]
    cases = operation.as_strategy()  # which takes longer to make than to draw from
    for caller, examples in callers.items():
        send(fleet, operation, cases, caller, examples)


def send(fleet: LocalFleet, operation: Any, cases: Any, caller: str, examples: int) -> None:
    headers = authorization(fleet, caller)
    closed = caller == "nobody" and operation.path.startswith("/api/v1") and operation.label not in OPEN

    @hypothesis.settings(max_examples=examples, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=cases)
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
