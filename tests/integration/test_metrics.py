"""`GET /metrics` of a real server: what it says, who may read it, and that it asks the database little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from fleet_server import outbox
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.metrics import figures
from fleet_server.metrics.figures import FigureCollector, Figures
from fleet_server.metrics.repository import Census, census
from fleet_server.models import Deployment, Device, OutboxMessage, Rollout
from fleet_server.principals import DEFAULT_FLEET
from tests import promtool
from tests.rest import TOKEN, caller, fill, serving

NEAR, FAR = ("127.0.0.1", 50000), ("10.1.2.3", 50000)


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    with serving(tmp_path_factory.mktemp("server"), None) as app:
        fill(app.state.database, 7)
        yield app


def client(app: FastAPI, origin: tuple[str, int] = NEAR, **headers: str) -> TestClient:
    return TestClient(app, base_url="http://localhost", client=origin, headers=headers, raise_server_exceptions=False)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def read(app: FastAPI, name: str, **labels: str) -> float | None:
    return samples(client(app).get("/metrics").text).get((name, tuple(sorted(labels.items()))))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_it_counts_what_there_is(application: FastAPI) -> None:
    found = samples(client(application).get("/metrics").text)
    with application.state.database.read() as session:
        known = census(session)
        assert sum(known.devices.values()) == session.query(Device).count() == 7
        paused = session.query(Deployment).count()
    assert found["shoal_devices", (("fleet", DEFAULT_FLEET), ("state", "offline"))] == 7
    assert found["shoal_devices", (("fleet", DEFAULT_FLEET), ("state", "online"))] == 0
    assert sum(value for (name, _), value in found.items() if name == "shoal_rollouts") == 7
    # All deployments are of the first rollout, which has stopped: what is over is not counted for ever.
    assert paused == 7
    assert sum(value for (name, _), value in found.items() if name == "shoal_deployments") == 0
    assert found["shoal_webhook_deliveries", (("state", "dead"),)] == 3
    assert found["shoal_broker_connected", ()] == 0
    assert found["process_resident_memory_bytes", ()] > 1e6
    assert any(name == "shoal_database_statement_duration_seconds_count" for name, _ in found)


def test_deployments_of_rollouts_that_go_on_are_counted_by_phase(database: Database) -> None:
    first = fill(database, 7)["rollout_id"]
    with database.write() as session:
        session.get_one(Rollout, first).state = "running"
    with database.read() as session:
        assert census(session).deployments == {(DEFAULT_FLEET, "active"): 4, (DEFAULT_FLEET, "failed"): 3}


def test_what_waits_for_the_broker_is_counted(database: Database) -> None:
    with database.write() as session:
        for name in ("a", "b"):
            outbox.enqueue(session, fleet_id=DEFAULT_FLEET, topic=name, payload=b"x", retain=False)
    with database.read() as session:
        known = census(session)
        oldest = session.scalars(select(OutboxMessage).where(OutboxMessage.topic == "a")).one()
        assert (known.outbox, known.outbox_since) == (2, oldest.created_at)


def test_both_formats_are_what_their_parsers_take(application: FastAPI) -> None:
    plain = client(application).get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert list(text_string_to_metric_families(plain.text))
    wanted = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
    opened = client(application).get("/metrics", headers={"Accept": wanted})
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert list(open_metrics(opened.text))


@pytest.mark.skipif(not promtool.FOUND, reason="promtool is not installed (apt-get install prometheus)")
def test_promtool_finds_nothing_to_mend(application: FastAPI) -> None:
    promtool.check_metrics(client(application).get("/metrics").text)


def test_requests_are_counted_by_route_and_never_by_path(application: FastAPI) -> None:
    api = caller(application)
    labels = {"method": "GET", "route": "/api/v1/devices/{device_id}"}
    before = read(application, "shoal_http_requests_total", **labels, code="404") or 0
    for number in range(5):
        assert api.get(f"/devices/nobody-{number}").status_code == 404
    assert read(application, "shoal_http_requests_total", **labels, code="404") == before + 5
    counted = read(application, "shoal_http_request_duration_seconds_count", **labels)
    assert counted is not None
    assert counted >= before + 5
    for number in range(3):
        assert api.get(f"/nothing-{number}").status_code == 404
        client(application).request(f"VERB{number}", "/healthz")
    text = client(application).get("/metrics").text
    assert "nothing-" not in text
    assert "nobody-" not in text
    assert "VERB" not in text


def test_a_request_that_fails_is_counted(application: FastAPI) -> None:
    def fails() -> None:
        raise RuntimeError

    application.add_api_route("/fails", fails)
    assert client(application).get("/fails").status_code == 500
    assert read(application, "shoal_http_requests_total", method="GET", route="/fails", code="500") == 1


def test_near_means_this_machine_and_no_proxy(application: FastAPI) -> None:
    assert client(application).get("/metrics").status_code == 200
    assert client(application, FAR).get("/metrics").status_code == 401
    for header in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):
        assert client(application, **{header: "10.1.2.3"}).get("/metrics").status_code == 401
    assert client(application, FAR, **bearer(TOKEN)).get("/metrics").status_code == 200
    assert client(application, FAR, **bearer("shoal_no_token")).get("/metrics").status_code == 401


def test_a_fleets_token_gets_that_fleets_figures_alone(application: FastAPI) -> None:
    api = caller(application)
    assert api.post("/fleets", json={"id": "plant7"}).status_code == 201
    created = api.post("/tokens", json={"name": "prometheus", "role": "viewer"}, headers={"X-Shoal-Fleet": "plant7"})
    found = samples(client(application, FAR, **bearer(created.json()["token"])).get("/metrics").text)
    assert {dict(labels).get("fleet") for _, labels in found} == {"plant7"}
    assert {name for name, _ in found} == {"shoal_devices", "shoal_rollouts", "shoal_deployments"}
    whole = samples(client(application, FAR, **bearer(TOKEN)).get("/metrics").text)
    assert ("shoal_outbox_messages", ()) in whole


@pytest.mark.parametrize(
    ("access", "near", "far", "admin"),
    [("token", 401, 401, 200), ("open", 200, 200, 200), ("off", 404, 404, 404)],
)
def test_who_may_read_is_a_setting(tmp_path: Path, access: str, near: int, far: int, admin: int) -> None:
    with serving(tmp_path, None, metrics=access) as app:
        assert client(app).get("/metrics").status_code == near
        assert client(app, FAR).get("/metrics").status_code == far
        assert client(app, **bearer(TOKEN)).get("/metrics").status_code == admin


def test_fleets_beyond_a_bound_are_told_together(application: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FLEETS", 1)
    known = Census({("a", True): 2, ("b", True): 3, ("c", True): 4}, {}, {}, {}, {}, 0, None)

    class Known(Figures):
        def latest(self) -> Census:
            return known

    family = next(iter(FigureCollector(Known(application.state.database), utc_now).collect()))
    online = {one.labels["fleet"]: one.value for one in family.samples if one.labels["state"] == "online"}
    assert online == {"a": 2, figures.OTHERS: 7}


def test_however_often_somebody_asks_the_database_is_asked_seldom(database: Database) -> None:
    now, asked = 100.0, 0

    class Slow(Database):
        @contextmanager
        def read(self) -> Iterator[Session]:
            nonlocal asked, now
            asked += 1
            now += 2.0  # seconds that the counting takes
            with database.read() as session:
                yield session

    counting = Figures(Slow(database.url), lambda: now)
    for _ in range(50):
        assert counting.latest() is not None
        now += 1.0
    assert asked == 2, "of 54 seconds the database worked 4: it is left alone for 20 times as long as it took"


def test_while_the_database_does_not_answer_what_was_known_is_told(database: Database) -> None:
    now, works = 0.0, True

    class Away(Database):
        @contextmanager
        def read(self) -> Iterator[Session]:
            if not works:
                raise OperationalError("", {}, Exception("away"))
            with database.read() as session:
                yield session

    counting = Figures(Away(database.url), lambda: now)
    known = counting.latest()
    assert known is not None
    now, works = 100.0, False
    assert counting.latest() == known
    assert counting.age_s == 100.0
