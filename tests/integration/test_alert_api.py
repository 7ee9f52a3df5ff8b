"""Alert rules, routes, silences and alerts by the REST API, on SQLite and PostgreSQL."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from fleet_server.alerts import service
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.models import Alert, Device
from fleet_server.principals import DEFAULT_FLEET
from tests import rest
from tests.databases import make_empty, short_on_sqlite
from tests.integration.test_api import refused

HOT = {"name": "hot", "metric": "temperature_c", "threshold": 80, "clear": 70, "for_s": 60}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def application(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    url = None if request.param == "sqlite" else request.getfixturevalue("postgresql_url")
    with rest.serving(tmp_path_factory.mktemp("state"), url, alert_tick_s=600) as application:
        yield application


@pytest.fixture
def database(application: FastAPI) -> Database:
    database: Database = application.state.database
    with database.write() as session:
        make_empty(session)
    return database


@pytest.fixture
def api(application: FastAPI, database: Database) -> TestClient:
    return rest.caller(application)


def alert(database: Database, subject: str, **fields: Any) -> str:
    given = {"rule": "r", "metric": "offline", "severity": "warning", "state": "firing", "since": utc_now()}
    given |= {"heard_at": utc_now() if fields.get("state", "firing") == "firing" else None}
    row = Alert(fleet_id=DEFAULT_FLEET, rule_id=subject, subject=subject, **{**given, **fields})
    with database.write() as session:
        session.add(row)
    return row.id


def test_a_rule_is_shown_whole_and_changed_field_by_field(api: TestClient) -> None:
    made = api.post("/alert-rules", json=HOT)
    assert made.status_code == 201, made.text
    shown = made.json()
    assert (shown["unit"], shown["below"], shown["window_s"], shown["firing"]) == ("°C", False, 0, 0)
    changed = api.patch("/alert-rules/hot", json={"clear": None, "query": None, "severity": "critical"})
    assert changed.status_code == 200, changed.text
    assert (changed.json()["clear"], changed.json()["severity"], changed.json()["for_s"]) == (None, "critical", 60)
    refused(api.patch("/alert-rules/hot", json={"clear": 90}), 422, "invalid")
    problem = refused(api.patch("/alert-rules/hot", json={"threshold": None}), 422, "invalid")
    assert problem["problems"][0]["field"] == "threshold"
    assert api.get("/alert-rules/hot").json()["threshold"] == 80
    refused(api.post("/alert-rules", json=HOT), 409, "alert_rule_exists")
    refused(api.post("/alert-rules", json={**HOT, "name": "x", "query": "site=="}), 422, "bad_query")
    refused(api.post("/alert-rules", json={**HOT, "name": "x", "query": "sit==plant7"}), 422, "bad_query")
    refused(api.post("/alert-rules", json={**HOT, "name": "x", "metric": "heat"}), 422, "invalid")
    refused(api.patch("/alert-rules/hot", json={"metric": "offline"}), 422, "invalid")
    assert api.delete("/alert-rules/hot").status_code == 204
    refused(api.get("/alert-rules/hot"), 404, "alert_rule_not_found")


@short_on_sqlite("application")
def test_a_fleet_has_so_many_rules_and_routes(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_RULES", 3)
    monkeypatch.setattr(service, "MOST_ROUTES", 2)
    for number in range(3):
        assert api.post("/alert-rules", json={**HOT, "name": f"r{number}"}).status_code == 201
    refused(api.post("/alert-rules", json=HOT), 422, "too_many_alert_rules")
    for number in range(2):
        assert api.post("/alert-routes", json={"name": f"r{number}", "kind": "mqtt"}).status_code == 201
    refused(api.post("/alert-routes", json={"name": "one-more", "kind": "mqtt"}), 422, "too_many_alert_routes")


def test_alerts_are_found_counted_and_acknowledged(api: TestClient, database: Database) -> None:
    one = alert(database, "device/cam-1", device_id="cam-1")
    alert(database, "device/cam-2/model/yolo", device_id="cam-2", model="yolo", severity="critical")
    alert(database, "rollout/7", rollout_id="7", state="pending")
    over = alert(database, "device/cam-3", device_id="cam-3", state="resolved", resolved_at=utc_now())

    ends = (utc_now() + dt.timedelta(hours=1)).isoformat()
    quiet = {"rule": "r*", "subject": "device/cam-2*", "ends_at": ends, "comment": "works"}
    assert api.post("/alert-silences", json=quiet).status_code == 201

    def found(**parameters: str) -> list[str]:
        items = api.get("/alerts", params={"sort": "since", **parameters}).json()["items"]
        return [item["subject"] for item in items]

    assert len(found()) == 4
    assert found(state="firing") == ["device/cam-1", "device/cam-2/model/yolo"]
    assert found(severity="critical") == found(model="yolo") == found(silenced="true") == ["device/cam-2/model/yolo"]
    assert found(device="cam-1") == ["device/cam-1"]
    assert found(rollout="7") == ["rollout/7"]
    assert found(subject="device/*", state="firing", silenced="false") == ["device/cam-1"]
    counts = api.get("/alert-counts").json()
    assert (counts["pending"], counts["firing"], counts["unacknowledged"]) == (1, 2, 1)
    done = api.post(f"/alerts/{one}/acknowledge", json={"comment": "mine"}).json()
    assert (done["acknowledged_by"], done["comment"]) == ("admin", "mine")
    assert found(acknowledged="true") == ["device/cam-1"]
    assert api.get("/alert-counts").json()["unacknowledged"] == 0
    refused(api.post(f"/alerts/{over}/acknowledge", json={}), 409, "alert_resolved")
    refused(api.get("/alerts/nothing"), 404, "alert_not_found")


@short_on_sqlite("application")
def test_routes(api: TestClient) -> None:
    mail = {"name": "pager", "kind": "email", "to": ["ops@example.org"]}
    refused(api.post("/alert-routes", json=mail), 422, "no_mail_server")
    refused(api.post("/alert-routes", json={"name": "bus", "kind": "mqtt", "to": ["ops@example.org"]}), 422, "invalid")
    assert api.post("/alert-routes", json={"name": "bus", "kind": "mqtt"}).status_code == 201
    refused(api.post("/alert-routes", json={"name": "bus", "kind": "mqtt"}), 409, "alert_route_exists")
    refused(api.patch("/alert-routes/bus", json={"to": ["ops@example.org"]}), 422, "invalid")
    refused(api.patch("/alert-routes/bus", json={"wait_s": -1}), 422, "invalid")
    assert api.patch("/alert-routes/bus", json={"rules": ["hot"], "repeat_s": 0}).json()["rules"] == ["hot"]
    assert "shoal/v1/alerts/default" in api.post("/alert-routes/bus/test").json()["told"]
    assert api.delete("/alert-routes/bus").status_code == 204


def test_a_silence_is_of_something_and_ends(api: TestClient, database: Database) -> None:
    with database.write() as session:
        session.add(Device(id="cam-1", fleet_id=DEFAULT_FLEET))
    ahead = (utc_now() + dt.timedelta(hours=1)).isoformat()
    refused(api.post("/alert-silences", json={"ends_at": ahead, "comment": "x"}), 422, "invalid")
    silence = {"query": "id==cam-1", "ends_at": ahead, "comment": "works"}
    for wrong in ("2020-01-01T00:00:00Z", "2999-01-01T00:00:00Z"):
        refused(api.post("/alert-silences", json={**silence, "ends_at": wrong}), 422, "bad_silence")
    refused(api.post("/alert-silences", json={**silence, "starts_at": "2998-01-01T00:00:00Z"}), 422, "bad_silence")
    refused(api.post("/alert-silences", json={**silence, "query": "site==x"}), 422, "bad_query")
    refused(api.post("/alert-silences", json={**silence, "starts_at": "0001-01-01T00:00:00+14:00"}), 422, "bad_time")
    made = api.post("/alert-silences", json=silence).json()
    assert made["active"]
    later = {**silence, "starts_at": (utc_now() + dt.timedelta(minutes=5)).isoformat()}
    assert not api.post("/alert-silences", json=later).json()["active"]
    assert [one["id"] for one in api.get("/alert-silences?active=true").json()["items"]] == [made["id"]]
    assert api.delete(f"/alert-silences/{made['id']}").status_code == 204
    refused(api.get(f"/alert-silences/{made['id']}"), 404, "alert_silence_not_found")


@short_on_sqlite("application")
def test_who_may_what(api: TestClient, application: FastAPI) -> None:
    tokens = {
        role: api.post("/tokens", json={"name": role, "role": role}).json()["token"] for role in ("viewer", "operator")
    }
    viewer, operator = (rest.caller(application, tokens[role]) for role in ("viewer", "operator"))
    assert viewer.get("/alerts").status_code == viewer.get("/alert-rules").status_code == 200
    refused(viewer.post("/alert-rules", json=HOT), 403, "role_needed")
    assert operator.post("/alert-rules", json=HOT).status_code == 201
    refused(operator.get("/alert-routes"), 403, "role_needed")
