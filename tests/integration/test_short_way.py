"""The list of devices answers alike by the short way and by the endpoint, on SQLite and PostgreSQL."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import text
from starlette.testclient import TestClient

from fleet_server import short_way
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices.listing import Page, Wanted
from fleet_server.loop_reads import LoopReads
from fleet_server.models import Device, Fleet, Profile
from fleet_server.paging import encode_cursor
from fleet_server.principals import DEFAULT_FLEET
from tests import rest
from tests.databases import make_empty

LONG = "created_since=2001-01-01T00:00:00Z"  # holds for every device, and is for the endpoint alone
SERVING = {"model": "m", "version": "1", "digest": "a" * 64, "deployment_id": "d", "runtime": "onnx", "provider": "cpu",
           "load_s": 0.1}  # fmt: skip
NEWER = {**SERVING, "fell_back": "no CUDA: “9”", "of_a_newer_agent": 1}
PROBLEM = {"code": "disk_full", "detail": "no room\n", "first_at": 1e9, "last_at": 1.5e9 + 0.25, "count": 2,
           "ongoing": True}  # fmt: skip
WAITS = {"model": "m", "version": "2", "waiting": {"reason": "budget", "detail": "x", "until": 1.7e9}}
FACTS = {"arch": "x86_64", "memory_mb": 2048, "tags": {"site": "plant 7", "line": "é"}, "runtimes": [{"name": "onnx"}]}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def application(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    url = None if request.param == "sqlite" else request.getfixturevalue("postgresql_url")
    with rest.serving(tmp_path_factory.mktemp("state"), url) as application:
        fill(application.state.database)
        yield application


@pytest.fixture
def api(application: FastAPI) -> TestClient:
    return rest.caller(application)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    """What the short way was asked for."""
    found: list[Wanted] = []
    read_page, await_page = short_way.read_page, short_way.await_page

    def noting_read(database: Database, fleet_id: str, wanted: Wanted) -> Page:
        page = read_page(database, fleet_id, wanted)
        found.append(wanted)
        return page

    async def noting_awaited(reads: LoopReads, fleet_id: str, wanted: Wanted) -> Page:
        page = await await_page(reads, fleet_id, wanted)
        found.append(wanted)
        return page

    monkeypatch.setattr(short_way, "read_page", noting_read)
    monkeypatch.setattr(short_way, "await_page", noting_awaited)
    return found


def fill(database: Database) -> None:
    at = dt.datetime(2026, 1, 31, 12, 0, tzinfo=dt.UTC)
    with database.write() as session:
        make_empty(session)
        session.add(Fleet(id="other"))
        profile = Profile(fleet_id=DEFAULT_FLEET, name="pi", spec=rest.SPEC)
        session.add(profile)
        session.flush()
        base: dict[str, Any] = {"fleet_id": DEFAULT_FLEET, "created_at": at}
        of_pi = {**base, "profile_id": profile.id, "facts": FACTS, "last_seen_at": at + dt.timedelta(microseconds=7)}
        session.add_all(
            [
                Device(id="cam-0", **base),
                Device(id="cam-1", **of_pi, online=True, serving=[SERVING, NEWER], tags={"line": "3", "x": '"\\'}),
                Device(id="cam-2", **of_pi, problems=[PROBLEM], reported_deployments=[{"waiting": None}, WAITS]),
                Device(id="cam-3", **of_pi, online=True, profile_pinned=True, desired_revision=7, reported_revision=6,
                       hold={"by": "user/ada", "at": "2026-02-01T00:00:00.5Z", "reason": "broken"}),
                Device(id="cam-4", **of_pi, forgotten_at=at),
                Device(id="cam-5", **base, tags={"site": "plant7"}),
                Device(id="elsewhere", fleet_id="other", created_at=at),
            ]
        )  # fmt: skip


@pytest.mark.parametrize(
    "query",
    [
        "", "limit=2", "limit=500", "sort=-id", "sort=id&limit=3", "online=true", "online=false", "profile=pi",
        "profile=none", "profile=pi&online=false&limit=1", f"cursor={encode_cursor('id', 'cam-1', 'cam-1')}",
        f"sort=-id&limit=1&cursor={encode_cursor('-id', 'cam-3', 'cam-3')}", "cursor=", "profile=p%C3%AD",
    ],
)  # fmt: skip
def test_both_ways_answer_alike(api: TestClient, answered: list[Wanted], query: str) -> None:
    short = api.get(f"/devices?{query}")
    assert len(answered) == 1
    long = api.get(f"/devices?{query}&{LONG}")
    assert len(answered) == 1, "the endpoint answered this one"
    assert (short.status_code, long.status_code) == (200, 200)
    assert short.json() == long.json()
    assert list(short.json()) == list(long.json())
    assert [list(one) for one in short.json()["items"]] == [list(one) for one in long.json()["items"]]
    of_either = {"content-type", "x-request-id", "etag", "cache-control", "content-security-policy"}
    assert of_either <= short.headers.keys()
    assert short.headers.keys() == long.headers.keys()
    if "link" in short.headers:
        following = api.get(f"http://localhost{short.links['next']['url']}").json()
        assert following == api.get(f"http://localhost{long.links['next']['url']}").json()


def test_what_is_known_is_not_sent_again(api: TestClient, answered: list[Wanted]) -> None:
    tag = api.get("/devices").headers["etag"]
    again = api.get("/devices", headers={"If-None-Match": f'"x", {tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert api.get("/devices", headers={"If-None-Match": '"x"'}).status_code == 200
    assert len(answered) == 3


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=0", "invalid"), ("limit=501", "invalid"), ("limit=x", "invalid"), ("sort=name", "invalid"),
        ("online=perhaps", "invalid"), ("cursor=rubbish", "bad_cursor"), ("profil=pi", "unknown_parameter"),
        (f"cursor={encode_cursor('-id', 'a', 'a')}", "cursor_of_other_sort"), ("profile=%00", "invalid"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_by_the_endpoint(api: TestClient, answered: list[Wanted], query: str, code: str) -> None:
    answer = api.get(f"/devices?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert answered == []


def test_who_may_not_is_refused(application: FastAPI, answered: list[Wanted]) -> None:
    for token, headers, status in (
        ("wrong", {}, 401),
        (rest.TOKEN, {"X-Shoal-Fleet": "nowhere"}, 403),
        (rest.TOKEN, {"Host": "elsewhere.example"}, 400),
    ):
        assert rest.caller(application, token).get("/devices", headers=headers).status_code == status
    assert answered == []
    other = rest.caller(application).get("/devices", headers={"X-Shoal-Fleet": "other"})
    assert [one["id"] for one in other.json()["items"]] == ["elsewhere"]
    assert len(answered) == 1


def test_a_request_is_counted_and_limited(application: FastAPI, api: TestClient) -> None:
    counted = ("shoal_http_requests_total", {"method": "GET", "route": "/api/v1/devices", "code": "200"})
    registry = application.state.instruments.registry
    before = registry.get_sample_value(*counted) or 0
    assert api.get("/devices").status_code == 200
    assert registry.get_sample_value(*counted) == before + 1


def test_a_connection_that_broke_is_replaced(application: FastAPI, api: TestClient, answered: list[Wanted]) -> None:
    whole = api.get("/devices").json()
    database: Database = application.state.database
    if database.is_sqlite:
        for connection in list(database._drivers):
            connection.close()
    else:
        end_backends(database)
    for _ in range(3):
        assert api.get("/devices").json() == whole
    assert len(answered) >= 3, "at most one of them went the long way"


def end_backends(database: Database) -> None:
    """As a database does that starts anew."""
    with database.engine.connect() as connection:
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        connection.execute(text(f"{others} AND datname = current_database()"))


def test_a_token_lets_nobody_in_once_its_revocation_was_answered(application: FastAPI, api: TestClient) -> None:
    made = api.post("/tokens", json={"name": f"ci-{utc_now():%f}", "role": "viewer"}).json()
    ci = rest.caller(application, made["token"])
    assert (ci.get("/devices").status_code, ci.get("/me").status_code) == (200, 200)
    assert api.delete(f"/tokens/{made['id']}").status_code == 204
    assert (ci.get("/devices").status_code, ci.get("/me").status_code) == (401, 401)
