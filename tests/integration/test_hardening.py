"""What stands around every endpoint: rates, bounded bodies, headers for browsers, problems that leak nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from fleet_server.access.authorization import RequestLimits
from fleet_server.app import create_app, running
from fleet_server.settings import Settings
from tests.integration.test_tenants import ADMIN, client, created


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    settings = Settings(
        state_dir=tmp_path_factory.mktemp("state"), broker_url="mqtt://127.0.0.1:1", conversion_workers=0,
        admin_token=ADMIN, request_max_mb=1,
    )  # fmt: skip
    app = create_app(settings)
    with running(app):
        yield app


@pytest.fixture
def api(application: FastAPI) -> TestClient:
    """With limits that nothing has used yet, and a clock that stands still."""
    settings = Settings(request_rate=2, request_burst=6, anonymous_rate=0.5, anonymous_burst=3)
    application.state.request_limits = RequestLimits(settings, lambda: 0.0)
    return client(application, ADMIN)


def test_each_principal_has_its_own_rate(application: FastAPI, api: TestClient) -> None:
    token = created(api.post("/api/v1/tokens", json={"name": "one", "role": "viewer"}))["token"]
    statuses = [api.get("/api/v1/me").status_code for _ in range(6)]
    assert statuses == [200] * 5 + [429]
    refused = api.get("/api/v1/me")
    assert (refused.json()["code"], refused.headers["retry-after"]) == ("too_many_requests", "1")
    assert client(application, token).get("/api/v1/me").status_code == 200


def test_who_proves_nothing_is_counted_by_address(application: FastAPI, api: TestClient) -> None:
    stranger = client(application, "shoal_0123456789abcdef_guess")
    assert [stranger.get("/api/v1/me").status_code for _ in range(5)] == [401] * 3 + [429] * 2
    login = {"name": "a", "password": "b"}
    assert stranger.post("/api/v1/login", json=login).status_code == 429
    assert stranger.get("/api/v1/me").headers["retry-after"] == "2"
    assert api.get("/api/v1/me").status_code == 200, "from the same address, with a token that holds"
    assert stranger.get("/healthz").status_code == 200


def test_a_body_that_is_no_upload_is_bounded(application: FastAPI, api: TestClient) -> None:
    large = b'{"name": "' + b"x" * (1 << 20) + b'"}'

    def pieces() -> Iterator[bytes]:
        yield from (large[start : start + 4096] for start in range(0, len(large), 4096))

    for content in (large, pieces()):
        answer = api.post("/api/v1/profiles", content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        assert answer.headers["content-type"] == "application/problem+json"
    assert api.post("/api/v1/uploads", content=large).status_code == 201


def test_every_answer_tells_browsers_what_it_may_do(application: FastAPI, api: TestClient) -> None:
    def failing() -> None:
        raise KeyError("SELECT secret FROM /var/lib/shoal")

    application.add_api_route("/api/v1/failing", failing)
    for path, status in (("me", 200), ("devices/nobody", 404), ("nowhere", 404), ("failing", 500)):
        answer = api.get(f"/api/v1/{path}")
        assert answer.status_code == status
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert "strict-transport-security" not in answer.headers
    for leaked in ("Traceback", "SELECT", "/var/lib", "KeyError"):
        assert leaked not in answer.text
    secure = api.get("https://localhost/healthz")
    assert "max-age" in secure.headers["strict-transport-security"]


def test_the_page_of_the_api_runs_its_own_script_alone(api: TestClient) -> None:
    page = api.get("/docs")
    policy = page.headers["content-security-policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'self' 'sha256-{digest}';" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert "frame-ancestors 'none'" in policy


def test_a_store_that_fails_does_not_say_where_it_is(application: FastAPI, api: TestClient, tmp_path: Path) -> None:
    digest = created(api.post("/api/v1/uploads", content=b"bytes"))["digest"]
    state: Path = application.state.settings.state_dir
    stored = state / "artifacts" / digest[:2]
    (stored / digest).unlink()
    stored.rmdir()
    stored.write_text("in the way")
    answer = api.get(f"/api/v1/artifacts/{digest}")
    assert answer.status_code == 503
    assert str(state) not in answer.text
