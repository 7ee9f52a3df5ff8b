"""Login, tokens and roles over the API, on SQLite and PostgreSQL."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from fastapi import FastAPI
from starlette.testclient import TestClient

from fleet_server.access import passwords, policy, secret_tokens
from fleet_server.access.authentication import LoginDesk
from fleet_server.access.authorization import RequestLimits
from fleet_server.app import create_app, running
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.models import AccessToken, User
from fleet_server.principals import Role
from fleet_server.settings import Settings
from tests import sqlite_file
from tests.databases import make_empty, short_on_sqlite

ADMIN = "the-admin-of-tests"
PASSWORD = "correct horse battery"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def application(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder = tmp_path_factory.mktemp("state")
    sqlite_file.put(folder)
    url = None if request.param == "sqlite" else request.getfixturevalue("postgresql_url")
    app = create_app(
        Settings(
            state_dir=folder,
            database_url=url,
            broker_url="mqtt://127.0.0.1:1",
            conversion_workers=0,
            admin_token=ADMIN,
        )
    )
    with running(app):
        yield app


@pytest.fixture(autouse=True)
def _cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argon2id with little memory: how much a guess costs is not what is tested here."""
    monkeypatch.setattr(passwords, "_hasher", PasswordHasher(time_cost=1, memory_cost=64, parallelism=1))


@pytest.fixture
def database(application: FastAPI) -> Database:
    database: Database = application.state.database
    with database.write() as session:
        make_empty(session)
    return database


@pytest.fixture
def admin(application: FastAPI, database: Database) -> TestClient:
    return client(application, ADMIN)


def client(application: FastAPI, token: str | None, **headers: str) -> TestClient:
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return TestClient(application, base_url="http://localhost/api/v1", headers=headers, raise_server_exceptions=False)


def as_another_server(application: FastAPI) -> None:
    """What was just written past this server is what another wrote two seconds ago."""
    application.state.known_principals.forget()


def make_token(admin: TestClient, name: str, role: str, **fields: Any) -> dict[str, Any]:
    answer = admin.post("/tokens", json={"name": name, "role": role, **fields})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def make_user(admin: TestClient, name: str, role: str, **fields: Any) -> None:
    answer = admin.post("/users", json={"name": name, "role": role, "password": PASSWORD, **fields})
    assert answer.status_code == 201, answer.text


def log_in(application: FastAPI, name: str, password: str = PASSWORD) -> Any:
    return client(application, None).post("/login", json={"name": name, "password": password})


@short_on_sqlite("application")
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic YTpi", f"Bearer {ADMIN}x", "Bearer \xff"])
def test_nobody_is_let_in_without_a_token(application: FastAPI, database: Database, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = client(application, None).get("/devices", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "not_authenticated")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_token_is_shown_once_expires_and_is_revoked(
    application: FastAPI, database: Database, admin: TestClient
) -> None:
    made = make_token(admin, "ci", "operator", days=1)
    assert "token" not in admin.get("/tokens").json()["items"][0]
    with database.read() as session:
        kept = session.get_one(AccessToken, made["id"])
        assert made["token"].rpartition("_")[2] not in (kept.digest, kept.name)
        assert kept.last_used_at is None
    ci = client(application, made["token"])
    assert ci.get("/me").json() == {"name": "token/ci", "fleet": "default", "role": "operator", "server_wide": False}
    assert admin.get("/tokens").json()["items"][0]["last_used_at"] is not None
    stolen = secret_tokens.mint()
    assert client(application, made["token"][:22] + stolen.text[22:]).get("/me").status_code == 401, (
        "its id is no proof"
    )
    again = admin.post("/tokens", json={"name": "ci", "role": "viewer"})
    assert (again.status_code, again.json()["code"]) == (409, "token_exists")
    with database.write() as session:
        session.get_one(AccessToken, made["id"]).expires_at = utc_now() - dt.timedelta(seconds=1)
    as_another_server(application)
    assert "has expired" in ci.get("/me").json()["detail"]
    with database.write() as session:
        session.get_one(AccessToken, made["id"]).expires_at = utc_now() + dt.timedelta(days=1)
    assert admin.delete(f"/tokens/{made['id']}").status_code == 204
    assert admin.delete(f"/tokens/{made['id']}").status_code == 204
    assert "was revoked" in ci.get("/me").json()["detail"]
    assert admin.delete("/tokens/0123456789abcdef").status_code == 404


@short_on_sqlite("application")
def test_a_role_too_small_is_told_which_it_needs(application: FastAPI, admin: TestClient) -> None:
    viewer = client(application, make_token(admin, "v", "viewer")["token"])
    assert viewer.get("/devices").status_code == 200
    for path, body, needed in (
        ("/profiles", {"name": "p", "runtime": "onnx"}, "operator"),
        ("/rollouts", {"version": "m@1", "target": {"all": True}}, "releaser"),
        ("/tokens", {"name": "t", "role": "viewer"}, "admin"),
    ):
        answer = viewer.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (403, "role_needed")
        assert f"role {needed}" in answer.json()["detail"]
    assert viewer.post("/logout").status_code == 204
    assert viewer.get("/me").status_code == 401


@short_on_sqlite("application")
def test_every_operation_is_closed_to_nobody_and_to_smaller_roles(
    application: FastAPI, database: Database, admin: TestClient
) -> None:
    if not database.is_sqlite:
        pytest.skip("one database is enough: nothing reaches it")
    application.state.request_limits = RequestLimits(Settings(anonymous_burst=1000), lambda: 0.0)
    nobody = client(application, None)
    callers = {role: client(application, make_token(admin, role, role)["token"]) for role in Role}
    for path, item in application.openapi()["paths"].items():
        for method, operation in item.items():
            action = operation["operationId"]
            if not path.startswith("/api/v1") or action in policy.PUBLIC | {"logout"}:
                continue
            where = re.sub(r"{\w+}", "0" * 64, path)
            assert nobody.request(method, f"http://localhost{where}").status_code == 401, action
            for role, caller in callers.items():
                answer = caller.request(method, f"http://localhost{where}")
                closed = not role.covers(policy.LEAST[action]) or action in policy.SERVER_WIDE
                assert (answer.status_code == 403) == closed, f"{action} as {role}: {answer.text}"


def test_a_user_logs_in_works_and_logs_out(application: FastAPI, database: Database, admin: TestClient) -> None:
    make_user(admin, "ada", "releaser")
    with database.read() as session:
        assert session.query(User).one().password_hash.startswith("$argon2id$")
    session_of_ada = log_in(application, "ada")
    assert session_of_ada.status_code == 200
    assert session_of_ada.json()["roles"] == {"default": "releaser"}
    ada = client(application, session_of_ada.json()["token"])
    assert ada.get("/me").json()["role"] == "releaser"
    assert admin.patch("/users/ada", json={"role": "viewer"}).json()["role"] == "viewer"
    assert ada.get("/me").json()["role"] == "viewer", "a new role holds at once"
    assert admin.get("/tokens").json()["items"] == [], "sessions are no service tokens"
    assert ada.post("/logout").status_code == 204
    assert ada.get("/me").status_code == 401
    again = client(application, log_in(application, "ada").json()["token"])
    assert admin.patch("/users/ada", json={"password": PASSWORD + "!"}).status_code == 200
    assert again.get("/me").status_code == 401, "a new password ends every session"
    assert log_in(application, "ada").status_code == 401
    once_more = client(application, log_in(application, "ada", PASSWORD + "!").json()["token"])
    assert admin.delete("/users/ada").status_code == 204
    assert once_more.get("/me").status_code == 401
    assert admin.get("/users").json()["items"] == []
    # The server makes the fleet's signing keys whenever it comes to it.
    done = [one["action"] for one in admin.get("/audit-events").json()["items"] if one["actor"] != "server"]
    assert done == [
        *("user.delete", "session.open", "user.update", "session.open", "session.close"),
        *("user.update", "session.open", "user.create"),
    ]


def test_a_wrong_name_and_a_wrong_password_are_answered_alike_and_ever_later(
    application: FastAPI, admin: TestClient
) -> None:
    application.state.login_desk = LoginDesk(dt.timedelta(hours=1), lambda: 0.0)  # a clock that stands still
    make_user(admin, "bob", "viewer")
    for name in ("bob", "nobody"):
        answers = [log_in(application, name, "a wrong password") for _ in range(6)]
        assert [one.status_code for one in answers] == [401] * 5 + [429]
        assert {one.json()["detail"] for one in answers[:5]} == {
            "name or password is wrong: try again, or ask an admin"
        }
        assert int(answers[5].headers["retry-after"]) >= 1
    assert log_in(application, "bob").status_code == 429, "the right password too: it may be the next guess"


def test_a_session_ends_by_itself(application: FastAPI, database: Database, admin: TestClient) -> None:
    make_user(admin, "eve", "viewer")
    token = log_in(application, "eve").json()["token"]
    with database.write() as session:
        session.query(AccessToken).one().expires_at = utc_now() - dt.timedelta(seconds=1)
    assert "session is over" in client(application, token).get("/me").json()["detail"]
    log_in(application, "eve")
    with database.read() as session:
        assert session.query(AccessToken).count() == 1, "the old one is swept away"


def test_the_first_start_makes_a_token(tmp_path: Path) -> None:
    app = create_app(Settings(state_dir=tmp_path, broker_url="mqtt://127.0.0.1:1", conversion_workers=0))
    with running(app):
        assert client(app, None).get("/me").status_code == 401
        token = (tmp_path / "admin-token").read_text().strip()
        me = client(app, token).get("/me").json()
    assert me == {"name": "admin", "fleet": "default", "role": "admin", "server_wide": True}
