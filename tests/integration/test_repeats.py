"""POSTs that are sent twice act once: by threads at two servers of one database, on SQLite and on PostgreSQL."""

from __future__ import annotations

import datetime as dt
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from fleet_server import idempotency
from fleet_server.catalog.service import InspectionRecord
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.models import EnrolmentToken, IdempotencyKey, Profile, Version
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.sdk import Client, UnreachableError
from tests import rest, sqlite_file
from tests.databases import make_empty
from tests.fleet import LocalFleet
from tests.integration.test_api import TENSOR, profile, refused, upload

KEY = "Idempotency-Key"
REPLAYED = "idempotency-replayed"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[FastAPI]]:
    """Two servers on one database."""
    folder = tmp_path_factory.mktemp("state")
    sqlite_file.put(folder)
    sqlite = f"sqlite:///{folder / 'shoal.db'}"
    url = sqlite if request.param == "sqlite" else request.getfixturevalue("postgresql_url")
    with rest.serving(folder / "a", url) as first, rest.serving(folder / "a", url) as second:
        yield [first, second]


@pytest.fixture
def database(servers: list[FastAPI]) -> Database:
    database: Database = servers[0].state.database
    with database.write() as session:
        make_empty(session)
    return database


@pytest.fixture
def api(servers: list[FastAPI], database: Database) -> TestClient:
    return rest.caller(servers[0])


def count(database: Database, model: Any) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(model)) or 0


def test_one_change_of_many_requests_with_one_key(servers: list[FastAPI], database: Database) -> None:
    """Tokens are made as often as one asks, and their text is shown once: a repeated request shows it again."""
    callers = [rest.caller(one) for one in servers]
    ready = threading.Barrier(12)

    def ask(number: int) -> Any:
        ready.wait()
        return callers[number % 2].post("/enrolment-tokens", json={"uses": 3}, headers={KEY: '"same"'})

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert count(database, EnrolmentToken) == 1
    good = [one for one in answers if one.status_code == 201]
    for one in answers:
        if one not in good:
            refused(one, 409, "request_in_progress")
            assert one.headers["retry-after"] == "1"
    for caller in callers:
        again = caller.post("/enrolment-tokens", json={"uses": 3}, headers={KEY: "same"})
        assert (again.status_code, again.headers[REPLAYED]) == (201, "true")
        assert again.headers["content-type"] == "application/json"
        good.append(again)
    assert len({one.content for one in good}) == 1
    assert sum(REPLAYED not in one.headers for one in good) == 1
    assert count(database, EnrolmentToken) == 1
    assert callers[0].post("/enrolment-tokens", json={"uses": 3}, headers={KEY: "other"}).status_code == 201
    assert count(database, EnrolmentToken) == 2


def test_the_database_does_not_show_what_a_kept_answer_holds(api: TestClient, database: Database) -> None:
    text = api.post("/enrolment-tokens", json={}, headers={KEY: "a-secret-key"}).json()["token"]
    with database.read() as session:
        row = session.scalars(select(IdempotencyKey)).one()
    assert row.body is not None
    assert text.encode() not in row.body
    with pytest.raises(zlib.error):
        zlib.decompress(row.body[12:])
    assert "a-secret-key" not in str(vars(row))


def test_a_key_is_for_one_request_of_one_principal(servers: list[FastAPI], api: TestClient) -> None:
    headers = {KEY: "k"}
    assert api.post("/profiles", json=profile("a"), headers=headers).status_code == 201
    refused(api.post("/profiles", json=profile("b"), headers=headers), 422, "idempotency_key_reused")
    refused(api.post("/fleets", json={"id": "x"}, headers=headers), 422, "idempotency_key_reused")
    token = api.post("/tokens", json={"name": "other", "role": "admin"}).json()["token"]
    other = rest.caller(servers[0], token).post("/profiles", json=profile("b"), headers=headers)
    assert other.status_code == 201
    assert REPLAYED not in other.headers
    for wrong in ("", '""', "ä", "a" * 256, '"a', "a, b"):
        answer = api.post("/profiles", json=profile("c"), headers={KEY: wrong.encode()})
        refused(answer, 422, "bad_idempotency_key")


def test_what_was_refused_may_be_tried_again(api: TestClient, database: Database) -> None:
    body = {"version": "m@1", "target": {"all": True}}
    for _ in range(2):
        refused(api.post("/rollouts", json=body, headers={KEY: "k"}), 404, "model_not_found")
        refused(api.post("/profiles", json={"name": "p"}, headers={KEY: "l"}), 422, "invalid")
    assert count(database, IdempotencyKey) == 0
    assert api.post("/profiles", json=profile("p"), headers={KEY: "l"}).status_code == 201


def test_a_request_that_is_being_answered_is_said_to_be(servers: list[FastAPI], api: TestClient) -> None:
    started, go_on = threading.Event(), threading.Event()

    class Slow:
        def inspect(self, wanted: Any, keep: Any) -> InspectionRecord:
            started.set()
            assert go_on.wait(60)
            return InspectionRecord(inputs=[TENSOR], outputs=[TENSOR], inspection={})

    servers[0].state.inspector = Slow()
    body = {"name": "1", "sources": [{"format": "onnx", "digest": upload(api, b"weights")}]}
    path, headers = "/models/m/versions", {KEY: "k"}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(api.post, path, json=body, headers=headers)
        assert started.wait(60)
        try:
            refused(rest.caller(servers[1]).post(path, json=body, headers=headers), 409, "request_in_progress")
        finally:
            go_on.set()
        assert first.result().status_code == 201
    again = api.post(path, json=body, headers=headers)
    assert (again.content, again.headers[REPLAYED]) == (first.result().content, "true")
    assert count(servers[0].state.database, Version) == 1


def claim(name: str, fingerprint: str) -> idempotency.Claim:
    return idempotency.Claim(DEFAULT_FLEET, "admin", b"k", fingerprint, name)


def test_the_claim_of_a_server_that_died_runs_out_and_is_worth_nothing_then(
    api: TestClient, database: Database
) -> None:
    """It claimed, and was silent; another took over; when it comes back, its change must not be made."""
    api.post("/profiles", json=profile("p"), headers={KEY: "k"})
    with database.write() as session:
        row = session.scalars(select(IdempotencyKey)).one()
        dead = claim(row.claim, row.fingerprint)
        row.status, row.body, row.claimed_until = None, None, utc_now() + dt.timedelta(seconds=30)
        session.delete(session.scalars(select(Profile)).one())
    refused(api.post("/profiles", json=profile("p"), headers={KEY: "k"}), 409, "request_in_progress")
    with database.write() as session:
        session.execute(update(IdempotencyKey).values(claimed_until=utc_now()))
    answer = api.post("/profiles", json=profile("p"), headers={KEY: "k"})
    assert answer.status_code == 201
    assert REPLAYED not in answer.headers
    with database.write() as session:
        assert not idempotency._keep(session, dead, JSONResponse({"of": "the dead"}))
    assert api.post("/profiles", json=profile("p"), headers={KEY: "k"}).content == answer.content


def test_who_lost_the_claim_does_not_commit(
    api: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = idempotency._keep

    def overtaken(session: Any, mine: idempotency.Claim, answer: Any) -> bool:
        session.execute(update(IdempotencyKey).values(claim="another's"))
        return real(session, mine, answer)

    monkeypatch.setattr(idempotency, "_keep", overtaken)
    refused(api.post("/profiles", json=profile("p"), headers={KEY: "k"}), 409, "request_in_progress")
    assert count(database, Profile) == 0


def test_keys_are_forgotten_after_a_time_and_beyond_a_number(
    api: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "MOST_KEYS", 4)
    for number in range(7):
        assert api.post("/enrolment-tokens", json={}, headers={KEY: f"k{number}"}).status_code == 201
    assert count(database, IdempotencyKey) == 4
    assert REPLAYED in api.post("/enrolment-tokens", json={}, headers={KEY: "k6"}).headers
    with database.write() as session:
        session.execute(update(IdempotencyKey).values(expires_at=utc_now()))
    assert REPLAYED not in api.post("/enrolment-tokens", json={}, headers={KEY: "k6"}).headers
    assert count(database, IdempotencyKey) == 1


def test_uploads_and_logins_take_a_key_and_need_none(api: TestClient, database: Database) -> None:
    """Bytes are kept by their digest, and who logs in is nobody yet."""
    for content in (b"one", b"two"):
        assert api.post("/uploads", content=content, headers={KEY: "k"}).status_code == 201
    refused(api.post("/login", json={"name": "a", "password": "b"}, headers={KEY: "k"}), 401, "wrong_login")
    assert count(database, IdempotencyKey) == 0


class Lossy(httpx.BaseTransport):
    """Loses the first answers: the server has acted, and the client hears nothing of it."""

    def __init__(self, losses: int) -> None:
        self.losses = losses
        self.sent: list[tuple[str, str | None]] = []
        self._real = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._real.handle_request(request)
        self.sent.append((request.method, request.headers.get(KEY)))
        if self.losses > 0:
            self.losses -= 1
            answer.read()
            raise httpx.ReadError("the connection broke off")
        return answer

    def close(self) -> None:
        self._real.close()


def test_the_client_sends_again_what_got_lost(tmp_path_factory: pytest.TempPathFactory) -> None:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        token = fleet.authorization["Authorization"].removeprefix("Bearer ")
        with Client(fleet.url, token) as client:
            client._http.close()
            lossy = Lossy(2)
            client._http = httpx.Client(
                base_url=f"{fleet.url}/api/v1", headers=fleet.authorization, transport=lossy, timeout=60
            )
            made = client.post("/enrolment-tokens", {"uses": 1})
            assert made["token"].startswith("shoal1.")
            assert len({key for _, key in lossy.sent}) == 1
            assert len(lossy.sent) == 3
            assert [one["id"] for one in client.items("/enrolment-tokens")] == [made["id"]]
            client.post("/enrolment-tokens", {"uses": 1})
            assert len(list(client.items("/enrolment-tokens"))) == 2
            lossy.losses = 100
            with pytest.raises(UnreachableError):
                client.post("/enrolment-tokens", {"uses": 1})
            assert lossy.losses == 97
            lossy.losses = 0
    finally:
        fleet.stop()
