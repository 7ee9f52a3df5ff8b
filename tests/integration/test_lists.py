"""Every list of the API: walked by every sort it has, over rows that are alike, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from fleet_server.paging import encode_cursor
from fleet_server.schemas import PAGE_LIMIT
from tests import rest
from tests.api_document import document
from tests.databases import make_empty, short_on_sqlite
from tests.integration.test_api import refused

COUNT = 9
SHORT_PAGE = 3  # rows that are alike come in twos and more: some lie on both sides of its end
LISTS = {
    item["get"]["operationId"]: (path, {one["name"]: one["schema"] for one in item["get"].get("parameters", [])})
    for path, item in document()["paths"].items()
    if "get" in item
    and "Page_" in str(item["get"]["responses"]["200"].get("content", {}).get("application/json", {}).get("schema"))
}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def application(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    url = None if request.param == "sqlite" else request.getfixturevalue("postgresql_url")
    with rest.serving(tmp_path_factory.mktemp("state"), url) as application:
        yield application


@pytest.fixture(scope="module")
def names(application: FastAPI) -> dict[str, str]:
    """A database with many rows that are alike; by the name of a path's parameter, one of each thing."""
    with application.state.database.write() as session:
        make_empty(session)
    return rest.fill(application.state.database, COUNT)


@pytest.fixture
def api(application: FastAPI, names: dict[str, str]) -> TestClient:
    return rest.caller(application)


def walk(api: TestClient, path: str, sort: str, limit: int) -> list[Any]:
    rows: list[Any] = []
    following: str | None = f"{path}?limit={limit}&sort={sort}"
    while following is not None:
        answer = api.get(f"http://localhost{following}")
        assert answer.status_code == 200, answer.text
        rows += answer.json()["items"]
        following = answer.links["next"]["url"] if "link" in answer.headers else None
        assert (answer.json()["next_cursor"] is None) == (following is None)
    return rows


def walks(api: TestClient, path: str, sort: str) -> tuple[list[Any], list[Any], list[Any]]:
    """All rows at once, in pages, and in pages backwards; nothing was written in between, as a server at work may."""
    for _ in range(5):
        whole = walk(api, path, sort, PAGE_LIMIT)
        found = whole, walk(api, path, sort, SHORT_PAGE), walk(api, path, f"-{sort}", SHORT_PAGE)
        if walk(api, path, sort, PAGE_LIMIT) == whole:
            return found
    raise AssertionError(f"{path} is another each time it is read")


def shown(row: dict[str, Any], sort: str) -> Any:
    """What a row shows of what it is sorted by; nothing where it does not show it."""
    found = row.get(sort, "")
    return "" if found is None else found


@pytest.mark.parametrize("operation", sorted(LISTS))
def test_every_sort_walks_every_row_once_and_in_order(operation: str, api: TestClient, names: dict[str, str]) -> None:
    path, parameters = LISTS[operation]
    path = path.format(**names)
    assert parameters["limit"]["maximum"] == PAGE_LIMIT
    for sort in parameters["sort"]["enum"][::2]:
        whole, pages, backwards = walks(api, path, sort)
        assert operation in {"list_architectures", "list_events"} or len(whole) >= COUNT, operation
        assert pages == whole, sort
        assert backwards == whole[::-1], sort
        values = [shown(row, sort) for row in whole]
        assert values == sorted(values), sort
    plain = api.get(f"http://localhost{path}", params={"limit": PAGE_LIMIT}).json()["items"]
    assert plain == walk(api, path, parameters["sort"]["default"], PAGE_LIMIT)


def test_rows_that_are_alike_lie_on_both_sides_of_a_page(api: TestClient) -> None:
    """Or the test above would not show that ties are told apart."""
    states = [row["state"] for row in walk(api, "/api/v1/rollouts", "state", PAGE_LIMIT)]
    assert any(states[at - 1] == states[at] for at in range(SHORT_PAGE, len(states), SHORT_PAGE))


@short_on_sqlite("application")
@pytest.mark.parametrize("operation", sorted(LISTS))
def test_what_a_list_does_not_know_is_refused_by_name(operation: str, api: TestClient, names: dict[str, str]) -> None:
    path, parameters = LISTS[operation]
    path = path.format(**names).removeprefix("/api/v1")
    sorts = parameters["sort"]["enum"]
    refused(api.get(path, params={"limit": PAGE_LIMIT + 1}), 422, "invalid")
    refused(api.get(path, params={"sort": "password_hash"}), 422, "invalid")
    problem = refused(api.get(path, params={"stat": "failed"}), 422, "unknown_parameter")
    assert problem["problems"][0]["field"] == "stat"
    assert "sort" in problem["detail"]
    cursor = encode_cursor(sorts[0], "x", "y")
    other = refused(api.get(path, params={"cursor": cursor, "sort": sorts[1]}), 422, "cursor_of_other_sort")
    assert sorts[0] in other["detail"]
    for wrong in ("no cursor!", "AGEA", encode_cursor("nothing", "x", "y"), "W10", "MQ", "e30", "A" * 4000):
        refused(api.get(path, params={"cursor": wrong}), 422, "bad_cursor")
    for key in (["x"], {"a": 1}, None, True):
        wrong = encode_cursor(sorts[0], key, key)  # type: ignore[arg-type]
        refused(api.get(path, params={"cursor": wrong, "sort": sorts[0]}), 422, "bad_cursor")


def test_a_cursor_with_a_value_of_another_kind_is_refused(api: TestClient) -> None:
    for path, sort, value, unique in (
        ("/devices", "created_at", "yesterday", "dev-1"),
        ("/devices", "created_at", "2026-01-01T00:00:00", "dev-1"),
        ("/devices", "id", 7, "dev-1"),
        ("/audit-events", "sequence", "7", "7"),
        ("/telemetry/models", "requests", "many", "x"),
    ):
        cursor = encode_cursor(sort, value, unique)
        refused(api.get(path, params={"cursor": cursor, "sort": sort}), 422, "bad_cursor")


@pytest.mark.parametrize(
    ("path", "parameters", "count"),
    [
        ("/profiles", {"name": "profile-3"}, 1),
        ("/profiles", {"name": "profile-*"}, COUNT),
        ("/profiles", {"name": "PROFILE-*"}, 0),
        ("/models", {"name": "*-1"}, 1),
        ("/models", {"name": "model_*"}, 0),
        ("/users", {"role": "viewer"}, COUNT // 2),
        ("/users", {"role": "viewer", "name": "user-1"}, 1),
        ("/tokens", {"name": "token-2"}, 1),
        ("/rollouts", {"name": "rollout-1", "state": "paused"}, 3),
        ("/deployments", {"phase": "failed"}, 3),
        ("/deployments", {"phase": "active", "model": "model-0"}, 0),
        ("/enrolments", {"device": "dev-1"}, 2),
        ("/device-identities", {"revoked": "true"}, COUNT // 2),
        ("/device-identities", {"revoked": "false"}, COUNT - COUNT // 2),
        ("/webhook-deliveries", {"state": "dead", "type": "shoal.test.*"}, COUNT // 2),
        ("/webhook-deliveries", {"subject": "x/3"}, 1),
        ("/webhooks", {"active": "true"}, 0),
        ("/variants", {"created_since": "2999-01-01T00:00:00Z"}, 0),
        ("/variants", {"created_until": "2999-01-01T00:00:00Z"}, COUNT),
        ("/gate-runs", {"created_since": "2020-01-01"}, COUNT),
        ("/shard-plans", {"model": "model-1"}, 1),
    ],
)
def test_filters(path: str, parameters: dict[str, str], count: int, api: TestClient) -> None:
    answer = api.get(path, params=parameters)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["items"]) == count


def test_times_bound_a_list_on_both_sides(api: TestClient) -> None:
    """A list's rows fall into two parts at any time between."""
    whole = api.get("/devices").json()["items"]
    between = sorted(row["created_at"] for row in whole)[COUNT // 2]
    later = api.get("/devices", params={"created_since": between}).json()["items"]
    earlier = api.get("/devices", params={"created_until": between}).json()["items"]
    assert sorted(row["id"] for row in [*later, *earlier]) == [row["id"] for row in whole]
    assert all(row["created_at"] >= between for row in later)
    assert earlier
    assert later
    refused(api.get("/devices", params={"created_since": "0001-01-01T00:00:00+14:00"}), 422, "bad_time")


def test_the_audit_log_is_narrowed(api: TestClient) -> None:
    assert api.post("/profiles", json={"name": "audited", "runtime": "onnx"}).status_code == 201
    assert api.delete("/profiles/audited").status_code == 204
    for parameters, actions in (
        ({"subject": "profile/audited"}, ["profile.delete", "profile.create"]),
        ({"action": "profile.c*", "subject": "*/audited"}, ["profile.create"]),
        ({"actor": "nobody"}, []),
        ({"subject": "profile/audited", "until": "2020-01-01"}, []),
    ):
        answer = api.get("/audit-events", params=parameters)
        assert [row["action"] for row in answer.json()["items"]] == actions
