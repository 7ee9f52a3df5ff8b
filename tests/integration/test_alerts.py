"""Alerts over a real database, on SQLite and PostgreSQL: what fires, what resolves, who is told, and how often."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, insert, select
from sqlalchemy.orm import Session

from agent.protocol.histogram import bucket_of
from agent.protocol.messages import HostWindow, ModelWindow
from agent.protocol.sketch import bucket_of as number_of
from fleet_server.alerts import readings, repository, service
from fleet_server.alerts.drift import recent
from fleet_server.alerts.keeper import AlertKeeper
from fleet_server.alerts.schemas import RouteCreate, RouteUpdate, RuleCreate, RuleSpec, RuleUpdate, SilenceCreate
from fleet_server.alerts.scope import Rows, Scope
from fleet_server.alerts.shipped import RULES
from fleet_server.alerts.windows import counted, served
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices.attributes import Attribute
from fleet_server.devices.repository import add_attributes
from fleet_server.domain.alerting import KINDS, UNKNOWN_S, Metric
from fleet_server.errors import ConflictError, InvalidError
from fleet_server.models import (
    Alert,
    AlertMail,
    AlertRoute,
    AlertRule,
    Deployment,
    Device,
    DeviceCertificate,
    DeviceIdentity,
    Fleet,
    HostWindowRow,
    Lease,
    Model,
    ModelWindowRow,
    OutboxMessage,
    Profile,
    Rollout,
    TelemetryGroup,
    TelemetrySeries,
    Variant,
    Version,
    Webhook,
    WebhookDelivery,
)
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from fleet_server.telemetry.signals import pack_signals
from fleet_server.telemetry.sketches import pack_cells, pack_latency

FLEET = {"fleet_id": DEFAULT_FLEET}
SETTINGS = Settings(telemetry_interval_s=10, smtp_host="127.0.0.1", smtp_from="shoal@example.org")


class Clockwork:
    """A keeper, and a clock that the test sets."""

    def __init__(self, database: Database, *, shipped: bool = False) -> None:
        self.database = database
        self.now = utc_now() + dt.timedelta(days=1)  # ahead of what the server stamps by the real clock
        self.keeper = AlertKeeper(database, SETTINGS)
        if not shipped:
            with database.write() as session:
                session.get_one(Fleet, DEFAULT_FLEET).alert_defaults = 1

    def tick(self, seconds: float = 0.0) -> None:
        """Let time go by, and look at every rule."""
        self.now += dt.timedelta(seconds=seconds)
        self.keeper._looked = {}
        self.keeper.tick(self.now)

    def ago(self, seconds: float) -> dt.datetime:
        return self.now - dt.timedelta(seconds=seconds)

    def add(self, *rows: Any) -> None:
        with self.database.write() as session:
            for row in rows:
                session.add(row)
                session.flush()

    def rule(self, name: str = "r", **fields: Any) -> None:
        with self.database.write() as session:
            wanted = RuleCreate.model_validate({"name": name, **fields})
            service.create_rule(session, DEFAULT_FLEET, wanted, actor="test")

    def route(self, kind: str = "webhook", **fields: Any) -> None:
        to = ["ops@example.org"] if kind == "email" else []
        with self.database.write() as session:
            wanted = RouteCreate.model_validate({"name": kind, "kind": kind, "to": to, **fields})
            service.create_route(session, SETTINGS, DEFAULT_FLEET, wanted, actor="test")

    def alerts(self, state: str | None = None) -> list[Alert]:
        with self.database.read() as session:
            query = select(Alert).order_by(Alert.id)
            return list(session.scalars(query if state is None else query.where(Alert.state == state)))

    def states(self) -> dict[str, str]:
        return {one.subject: one.state for one in self.alerts()}

    def events(self) -> list[dict[str, Any]]:
        with self.database.read() as session:
            rows = session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.id))
            return [json.loads(one.body) for one in rows]

    def told(self) -> list[tuple[str, int, bool]]:
        return [(one["data"]["state"], one["data"]["count"], one["data"]["repeated"]) for one in self.events()]

    def devices(self, *names: str, online: bool = True, seen: float = 0.0) -> None:
        self.add(*(Device(id=one, **FLEET, online=online, last_seen_at=self.ago(seen)) for one in names))

    def change(self, name: str, **fields: Any) -> None:
        with self.database.write() as session:
            for field, value in fields.items():
                setattr(session.get_one(Device, name), field, value)

    def host(self, device_id: str, **fields: float) -> None:
        self.add(HostWindowRow(**FLEET, device_id=device_id, ended_at=self.now, **fields))

    def window(self, device_id: str, *, model: str = "m", requests: int = 0, errors: int = 0, rejected: int = 0,
               seconds: float = 0.01, cells: Sequence[tuple[int, int, int]] = (), signals: bytes | None = None,
               deployment: str = "") -> None:  # fmt: skip
        with self.database.write() as session:
            series = session.scalar(
                select(TelemetrySeries).where(
                    TelemetrySeries.device_id == device_id,
                    TelemetrySeries.model == model,
                    TelemetrySeries.deployment_id == deployment,
                )
            )
            if series is None:
                series = TelemetrySeries(
                    **FLEET, device_id=device_id, model=model, deployment_id=deployment, version="1", digest="",
                    provider="cpu",
                )  # fmt: skip
                session.add(series)
                session.flush()
            group = TelemetryGroup(**FLEET, stored_at=self.now)
            session.add(group)
            session.flush()
            latency = pack_latency({bucket_of(seconds): requests} if requests else {})
            session.add(
                ModelWindowRow(
                    group_id=group.id, number=0, series_id=series.id, started_at=self.ago(10), ended_at=self.now,
                    requests=requests, errors=errors, rejected=rejected, items=requests, latency=latency,
                    confusion=pack_cells(cells), signals=signals,
                )
            )  # fmt: skip

    def deployment(self, device_id: str, **fields: Any) -> str:
        """With all that it rests on; returns its rollout's id."""
        with self.database.write() as session:
            model = session.scalar(select(Model)) or Model(**FLEET, name="m")
            session.add(model)
            session.flush()
            name = f"{len(fields)}-{device_id}-{self.now:%H%M%S}"
            version = Version(**FLEET, model_id=model.id, name=name, inputs=[], outputs=[])
            profile = session.scalar(select(Profile)) or Profile(**FLEET, name="p", spec={})
            session.add_all([version, profile])
            session.flush()
            variant = Variant(**FLEET, version_id=version.id, profile_id=profile.id, profile_spec={}, state="ready")
            rollout = Rollout(**FLEET, name="r", version_id=version.id, state=fields.pop("state", "running"),
                              target={}, strategy={})  # fmt: skip
            session.add_all([variant, rollout])
            session.flush()
            session.add(
                Deployment(**FLEET, rollout_id=rollout.id, device_id=device_id, model_id=model.id, stage=0,
                           version_id=version.id, variant_id=variant.id, **fields)
            )  # fmt: skip
            return rollout.id


@pytest.fixture
def works(database: Database) -> Clockwork:
    works = Clockwork(database)
    hook = Webhook(**FLEET, url="https://hooks.invalid/", types=["shoal.alert.*"], secret="", created_by="")
    works.add(hook)
    return works


# -- what is shipped


def test_every_fleet_gets_what_is_shipped_and_gets_it_once(database: Database) -> None:
    works = Clockwork(database, shipped=True)
    works.add(Fleet(id="other"))
    works.tick()
    with database.write() as session:
        for fleet in (DEFAULT_FLEET, "other"):
            found = repository.rows_of(session, AlertRule, fleet)
            assert {one.name for one in found} == set(RULES)
            assert all(one.shipped for one in found)
            assert [one.name for one in repository.rows_of(session, AlertRoute, fleet)] == ["webhooks"]
        service.delete_rule(session, service.get_rule(session, DEFAULT_FLEET, "drift"), actor="test")
    works.tick(10)
    with database.read() as session:
        assert "drift" not in {one.name for one in repository.rows_of(session, AlertRule, DEFAULT_FLEET)}
    assert works.alerts() == []


# -- from pending to resolved


def test_a_device_that_goes_offline_fires_after_a_while_and_resolves_when_it_is_back(works: Clockwork) -> None:
    works.devices("a", "b")
    works.rule(metric="offline", for_s=300)
    works.route(wait_s=30)
    works.change("a", online=False)
    works.tick(10)
    assert works.states() == {"device/a": "pending"}
    works.tick(290)
    assert works.states()["device/a"] == "pending"
    works.change("b", last_seen_at=works.now)
    works.tick(10)
    assert works.states() == {"device/a": "firing"}
    assert works.told() == []
    works.change("b", last_seen_at=works.now)
    works.tick(30)
    assert works.told() == [("firing", 1, False)]
    event = works.events()[0]
    assert (event["type"], event["subject"]) == ("shoal.alert.firing", "alert-rule/r")
    assert event["data"]["alerts"][0]["subject"] == "device/a"
    works.change("a", online=True, last_seen_at=works.now)
    works.tick(10)
    assert works.states() == {"device/a": "resolved"}
    works.tick(400)
    assert works.told()[1:2] == [("resolved", 1, False)]
    assert works.events()[1]["data"]["firing"] == 0
    assert works.alerts()[0].resolution == "it holds no more"


def test_a_device_that_says_nothing_is_offline_though_nobody_said_so(works: Clockwork) -> None:
    """A broker that dies sends no last wills."""
    works.devices("a", seen=59)
    works.rule(metric="offline")
    works.tick()
    assert works.alerts() == []
    works.tick(10)
    assert works.states() == {"device/a": "firing"}
    assert works.alerts()[0].value == pytest.approx(69)


def test_devices_that_nobody_waits_for_are_not_offline(works: Clockwork) -> None:
    works.devices("forgotten", "locked", "never", "other", online=False, seen=999)
    works.add(DeviceIdentity(device_id="locked", **FLEET, created_by="", revoked_at=works.now))
    works.change("forgotten", forgotten_at=works.now)
    works.change("never", last_seen_at=None)
    works.rule(metric="offline", query="id!=other")
    works.tick()
    assert works.alerts() == []


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_devices_that_go_at_once_are_one_notice(works: Clockwork, count: int) -> None:
    rows = [
        {"id": f"d{number}", **FLEET, "online": False, "last_seen_at": works.now, "facts": {}, "tags": {}}
        for number in range(count)
    ]
    with works.database.write() as session:
        session.execute(insert(Device), rows)
    works.rule(metric="offline", for_s=60)
    for kind in ("webhook", "email", "mqtt"):
        works.route(kind)
    for seconds in (0, 70, 40, 10):
        works.tick(seconds)
    assert len(works.alerts("firing")) == count
    assert works.told() == [("firing", count, False)]
    data = works.events()[0]["data"]
    assert (len(data["alerts"]), data["more"], data["firing"]) == (50, count - 50, count)
    with works.database.read() as session:
        mail, message = session.query(AlertMail).one(), session.query(OutboxMessage).one()
    assert mail.subject == f"[shoal default] {count} firing: r (warning)"
    assert f"and {count - 50} more" in mail.body
    assert (message.topic, message.retain) == ("shoal/v1/alerts/default", False)
    assert json.loads(message.payload) == data
    with works.database.write() as session:
        session.query(Device).update({"online": True, "last_seen_at": works.now + dt.timedelta(seconds=300)})
    works.tick(300)
    works.tick(30)
    assert works.alerts("firing") == []
    assert works.told() == [("firing", count, False), ("resolved", count, False)]


def test_what_hovers_does_not_flap_and_what_says_nothing_is_not_well(works: Clockwork) -> None:
    works.devices("a", "b")
    works.rule(metric="temperature_c", threshold=90, clear=80)
    for value, state in ((70.0, None), (95.0, "firing"), (85.0, "firing"), (79.0, "resolved")):
        works.tick(10)
        works.host("a", temperature_c=value)
        works.tick()
        assert works.states().get("device/a") == state
    works.host("b", temperature_c=99.0)
    works.tick(10)
    works.tick(1000)
    assert works.states()["device/b"] == "firing", "its last window is too old to say anything"
    works.tick(UNKNOWN_S)
    assert works.states()["device/b"] == "resolved"
    assert "nothing was heard" in works.alerts()[-1].resolution


# -- what rules look at


@pytest.mark.parametrize(
    ("metric", "bad", "well"),
    [
        ("cpu_percent", {"cpu_percent": 99.0}, {"cpu_percent": 10.0}),
        ("agent_memory_mb", {"agent_rss_mb": 99.0}, {"agent_rss_mb": 10.0}),
        ("memory_percent", {"memory_used_mb": 1900.0}, {"memory_used_mb": 100.0}),
        ("disk_free_mb", {"disk_free_mb": 10.0}, {"disk_free_mb": 99.0}),
    ],
)
def test_what_devices_say_of_themselves(
    works: Clockwork, metric: str, bad: dict[str, float], well: dict[str, float]
) -> None:
    works.devices("a", "b", "c")
    with works.database.write() as session:
        for name in ("a", "b"):
            add_attributes(session, [(session.get_one(Device, name), Attribute("memory_mb", "2000", 2000.0))])
    for name in ("a", "b"):
        works.host(name, **well)
    works.host("a", **bad)
    works.rule(metric=metric, threshold=50)
    works.tick()
    assert works.states() == {"device/a": "firing"}


@pytest.mark.parametrize(
    ("metric", "threshold", "bad", "well"),
    [
        ("latency_p95_ms", 50, {"requests": 100, "seconds": 0.2}, {"requests": 100, "seconds": 0.01}),
        ("error_percent", 5, {"requests": 100, "errors": 6}, {"requests": 100, "errors": 5}),
        ("rejected_percent", 5, {"requests": 90, "rejected": 10}, {"requests": 99, "rejected": 1}),
        (
            "accuracy_percent",
            90,
            {"requests": 1, "cells": [(0, 1, 10), (1, 1, 40)]},
            {"requests": 1, "cells": [(0, 0, 50)]},
        ),
        ("latency_p99_ms", 50, {"requests": 100, "seconds": 0.2}, {"requests": 5, "seconds": 0.2}),
    ],
)
def test_what_models_do(
    works: Clockwork, metric: str, threshold: float, bad: dict[str, Any], well: dict[str, Any]
) -> None:
    works.devices("a", "b")
    works.window("a", **bad)
    works.window("b", **well)
    works.window("b", model="other", **bad)
    works.rule(metric=metric, threshold=threshold, model="m")
    works.tick(10)
    assert works.states() == {"device/a/model/m": "firing"}
    works.tick(400)
    assert works.states() == {"device/a/model/m": "firing"}, "nothing is known of it now"
    works.window("a", requests=1000, cells=[(0, 0, 50)])
    works.tick(10)
    assert works.states() == {"device/a/model/m": "resolved"}


def test_a_model_that_serves_and_is_asked_nothing_has_no_throughput(works: Clockwork) -> None:
    works.devices("a", "b")
    with works.database.write() as session:
        for name in ("a", "b"):
            add_attributes(session, [(session.get_one(Device, name), Attribute("model", "m", None))])
    works.window("a", requests=3000)
    works.rule(metric="throughput_per_s", threshold=5)
    works.tick(10)
    assert works.states() == {"device/b/model/m": "firing"}


def drifting(middle: float, requests: int = 50) -> dict[str, Any]:
    counts = {number_of(middle + step / 10): requests // 10 for step in range(10)}
    window = ModelWindow("", "m", "1", "", "cpu", requests, 0, 0, requests, {}, (), inputs={"x": {"mean": counts}})
    return {"requests": requests, "signals": pack_signals(window, HostWindow())}


def test_a_model_that_is_asked_other_things_than_at_first_drifts_and_a_new_version_begins_anew(
    works: Clockwork,
) -> None:
    works.devices("a", "b")
    works.rule(metric="input_drift", threshold=0.25, window_s=60)
    for _ in range(6):
        works.window("a", **drifting(1.0))
        works.window("b", **drifting(1.0))
        works.now += dt.timedelta(seconds=10)
    works.tick()
    works.tick()
    assert works.alerts() == []
    works.now += dt.timedelta(seconds=100)
    for _ in range(6):
        works.window("a", **drifting(8.0))
        works.window("b", **drifting(1.0))
        works.now += dt.timedelta(seconds=10)
    works.tick()
    assert works.states() == {"device/a/model/m": "firing"}
    works.now += dt.timedelta(seconds=100)
    for _ in range(6):
        works.window("a", deployment="next", **drifting(8.0))
        works.now += dt.timedelta(seconds=10)
    works.tick()
    works.tick()
    assert works.states() == {"device/a/model/m": "resolved"}


def test_what_fell_back(works: Clockwork) -> None:
    works.devices("a", "b", "c")
    works.deployment("a", desired=True, fell_back="cuda is not there", phase="active")
    works.now += dt.timedelta(seconds=1)
    works.deployment("b", desired=True, phase="active")
    works.deployment("c", desired=False, fell_back="cuda is not there", phase="superseded")
    works.rule(metric="fell_back")
    works.tick()
    assert works.states() == {"device/a/model/m": "firing"}
    assert "cuda is not there" in works.alerts()[0].detail


def test_what_went_back_by_itself_is_over_when_a_later_version_serves(works: Clockwork) -> None:
    works.devices("a", "b")
    failure = {"code": "errors", "detail": "half of the requests failed"}
    works.deployment("a", phase="rolled_back", settled_at=works.now, failure=failure)
    works.deployment("b", phase="rolled_back", settled_at=works.ago(7200))
    works.rule(metric="rolled_back")
    works.tick()
    assert works.states() == {"device/a/model/m": "firing"}
    assert "half of the requests failed" in works.alerts()[0].detail
    works.now += dt.timedelta(seconds=10)
    works.deployment("a", phase="active", settled_at=works.now)
    works.tick()
    assert works.states() == {"device/a/model/m": "resolved"}


def test_a_rollout_that_stands_still_with_deployments_under_way_is_stuck(works: Clockwork) -> None:
    works.devices("a", "b", "c", "d")
    stuck = works.deployment("a", sent_at=works.ago(4000), phase="downloading")
    works.now += dt.timedelta(seconds=1)
    works.deployment("b", sent_at=works.ago(4000), settled_at=works.ago(3990), phase="active")
    works.deployment("c", sent_at=works.ago(4000), phase="downloading", is_waiting=True)
    works.now += dt.timedelta(seconds=1)
    works.deployment("d", sent_at=works.ago(4000), phase="downloading", state="paused")
    works.rule(metric="rollout_stuck_s", threshold=3600)
    works.tick()
    assert works.states() == {f"rollout/{stuck}": "firing"}


def test_certificates_that_end_soon(works: Clockwork) -> None:
    works.devices("a", "b", "c")

    def certificate(device: str, serial: str, left: float, *, revoked: bool = False) -> DeviceCertificate:
        return DeviceCertificate(
            serial=serial, **FLEET, device_id=device, key_sha256="", pem="", not_before=works.ago((90 - left) * 86400),
            not_after=works.now + dt.timedelta(days=left), revoked_at=works.now if revoked else None,
        )  # fmt: skip

    works.add(*(DeviceIdentity(device_id=one, **FLEET, created_by="") for one in "abc"))
    works.add(certificate("a", "1", 5), certificate("b", "2", 5), certificate("b", "3", 80))
    works.add(certificate("c", "4", 60), certificate("c", "5", 88, revoked=True))
    works.rule("days", metric="certificate_days", threshold=7)
    works.rule("percent", metric="certificate_percent", threshold=15)
    works.tick()
    assert sorted((one.rule, one.subject) for one in works.alerts()) == [("days", "device/a"), ("percent", "device/a")]


# -- who is told


def test_what_is_silenced_fires_untold_and_is_told_when_the_silence_ends(works: Clockwork) -> None:
    works.devices("cam-1", "cam-2", online=False, seen=100)
    works.route(wait_s=0, interval_s=0, repeat_s=600)
    works.rule(metric="offline")
    until = works.now + dt.timedelta(seconds=1000)
    with works.database.write() as session:
        wanted = SilenceCreate(query="id==cam-1", ends_at=until, comment="works")
        service.create_silence(session, DEFAULT_FLEET, wanted, actor="test")
    works.tick(1)
    assert set(works.states().values()) == {"firing"}
    assert works.told() == [("firing", 1, False)]
    assert works.events()[0]["data"]["alerts"][0]["subject"] == "device/cam-2"
    works.tick(601)
    assert works.told()[1:] == [("firing", 1, True)]
    works.tick(500)
    works.tick(1)
    assert works.told()[2:] == [("firing", 1, False)]
    assert works.events()[2]["data"]["alerts"][0]["subject"] == "device/cam-1"


def test_what_was_silenced_all_the_time_is_not_told_at_its_end_either(works: Clockwork) -> None:
    works.devices("cam-1", online=False, seen=100)
    works.route(wait_s=0, interval_s=0)
    works.rule(metric="offline")
    with works.database.write() as session:
        wanted = SilenceCreate(rule="r", subject="device/cam-*", ends_at=works.now + dt.timedelta(days=1), comment="x")
        service.create_silence(session, DEFAULT_FLEET, wanted, actor="test")
    works.tick(1)
    works.change("cam-1", online=True, last_seen_at=works.now)
    works.tick(1)
    assert works.states() == {"device/cam-1": "resolved"}
    assert works.told() == []


def test_what_somebody_looks_after_is_not_told_again_until_it_resolves(works: Clockwork) -> None:
    works.devices("a", "b", online=False, seen=100)
    works.route(wait_s=0, interval_s=0, repeat_s=600)
    works.rule(metric="offline")
    works.tick(1)
    with works.database.write() as session:
        alert = session.get_one(Alert, works.alerts()[0].id)
        service.acknowledge(session, alert, "on my way", actor="test")
    works.tick(600)
    assert works.told()[1:] == [("firing", 1, True)]
    with works.database.write() as session:
        service.acknowledge(session, session.get_one(Alert, works.alerts()[1].id), "", actor="test")
    works.tick(600)
    assert len(works.told()) == 2
    works.change("a", online=True, last_seen_at=works.now)
    works.tick(1)
    assert works.told()[2:] == [("resolved", 1, False)]
    with works.database.write() as session, pytest.raises(ConflictError):
        service.acknowledge(session, session.get_one(Alert, works.alerts()[0].id), "", actor="test")


def test_a_route_hears_what_it_wants_and_a_new_one_what_fires_already(works: Clockwork) -> None:
    works.devices("a", online=False, seen=100)
    works.rule("minor", metric="offline", severity="info")
    works.rule("major", metric="offline", severity="critical")
    works.tick(1)
    works.route(wait_s=0, least_severity="warning")
    works.tick(1)
    assert [one["data"]["rule"] for one in works.events()] == ["major"]
    with works.database.write() as session:
        route = service.get_route(session, DEFAULT_FLEET, "webhook")
        service.change_route(session, route, RouteUpdate(enabled=False), actor="test")
    works.change("a", online=True, last_seen_at=works.now)
    works.tick(1)
    assert len(works.events()) == 1


def test_news_that_a_server_which_died_did_not_tell_are_told_by_the_next(works: Clockwork) -> None:
    works.devices("a", online=False, seen=100)
    works.rule(metric="offline")
    works.route(wait_s=30)
    works.tick()
    works.keeper.stop()
    other = AlertKeeper(works.database, SETTINGS)
    behind = works.now - dt.timedelta(seconds=5)  # its clock
    other.tick(behind)
    assert works.told() == []
    other.tick(behind + dt.timedelta(seconds=40))
    assert works.told() == [("firing", 1, False)]
    other.tick(behind + dt.timedelta(seconds=50))
    assert works.told() == [("firing", 1, False)]


def test_of_two_servers_one_looks(works: Clockwork) -> None:
    works.devices("a", online=False, seen=100)
    works.tick()
    works.rule(metric="offline")
    AlertKeeper(works.database, SETTINGS).tick(works.now)
    assert works.alerts() == []
    works.tick()
    assert works.states() == {"device/a": "firing"}


class ServerDiedError(BaseException):
    """It handles no more exceptions either."""


@pytest.mark.parametrize("moment", ["before_commit", "after_commit"])
def test_a_server_that_dies_at_any_commit_loses_nothing_and_says_nothing_twice(works: Clockwork, moment: str) -> None:
    works.route(wait_s=0, interval_s=0)
    works.devices("a")
    works.rule(metric="offline", for_s=10)
    for number in range(1, 40):
        died = False
        for online in (False, True):
            works.change("a", online=online, last_seen_at=works.now + dt.timedelta(seconds=100))
            with dying(number, moment) as left, contextlib.suppress(ServerDiedError):
                for _ in range(3):
                    works.tick(11)
            died |= left[0] <= 0
            with works.database.write() as session:
                session.query(Lease).delete()  # that of who died runs out
            works.keeper = AlertKeeper(works.database, SETTINGS)
            for _ in range(3):
                works.tick(11)
        assert [one[0] for one in works.told()] == ["firing", "resolved"] * number, f"at commit {number}"
        if not died:
            break
    assert number > 3, "the lease, the rule, the route"
    assert {one.state for one in works.alerts()} == {"resolved"}


@contextmanager
def dying(number: int, moment: str) -> Iterator[list[int]]:
    """The server dies at a commit; yields how many are left until then."""
    left = [number]

    def count(_: Session) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise ServerDiedError

    event.listen(Session, moment, count)
    try:
        yield left
    finally:
        event.remove(Session, moment, count)


# -- rules that change


def test_a_rule_that_is_disabled_or_means_others_is_over(works: Clockwork) -> None:
    works.devices("a", "b", online=False, seen=100)
    works.route(wait_s=0, interval_s=0)
    works.rule(metric="offline", query="id==a")
    works.tick()

    def change(**fields: Any) -> None:
        with works.database.write() as session:
            rule = service.get_rule(session, DEFAULT_FLEET, "r")
            service.change_rule(session, rule, RuleUpdate.model_validate(fields), actor="test")
        works.tick(1)

    change(query="id==b")
    assert works.states() == {"device/a": "resolved", "device/b": "firing"}
    assert works.told() == [("firing", 1, False), ("firing", 1, False), ("resolved", 1, False)]
    change(severity="critical")
    assert [one.severity for one in works.alerts("firing")] == ["critical"]
    change(enabled=False)
    assert set(works.states().values()) == {"resolved"}
    assert works.alerts()[-1].resolution == "its rule was disabled"
    assert works.told()[3:] == [("resolved", 1, False)]
    with pytest.raises(InvalidError, match="threshold"):
        change(threshold=3)
    change(enabled=True)
    assert works.told()[4:] == [("firing", 1, False)]
    with works.database.write() as session:
        service.delete_rule(session, service.get_rule(session, DEFAULT_FLEET, "r"), actor="test")
    assert works.told()[5:] == [("resolved", 1, False)]
    assert works.alerts("firing") == []


# -- plans


def spec_of(metric: Metric) -> RuleSpec:
    kind = KINDS[metric]
    return RuleSpec.model_validate({"metric": metric, "threshold": 1 if kind.counted else None})


QUERIES = {
    "offline": (readings.offline, Metric.OFFLINE, "devices"),
    "hosts": (readings.hosts, Metric.DISK_FREE_MB, "devices"),
    "certificates": (readings.certificates, Metric.CERTIFICATE_DAYS, "device_certificates"),
    "fell_back": (readings.fell_back, Metric.FELL_BACK, "ix_deployments_fell_back"),
    "rolled_back": (readings.rolled_back, Metric.ROLLED_BACK, "ix_deployments_rolled_back"),
    "moving": (readings.moving, Metric.ROLLOUT_STUCK_S, "deployments"),
    "counted": (counted, Metric.ERROR_PERCENT, "ix_model_windows_series_id_ended_at"),
    "served": (served, Metric.THROUGHPUT_PER_S, "device_attributes"),
    "drift": (recent, Metric.INPUT_DRIFT, "ix_model_windows_series_id_ended_at"),
}


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_no_look_reads_a_whole_table(database: Database, name: str) -> None:
    """SQLite says how it finds rows: each in an index, and none of another fleet."""
    make, metric, index = QUERIES[name]
    with database.read() as session:
        query: Rows = make(Scope(session, DEFAULT_FLEET, spec_of(metric), 10.0, utc_now()))
        plan = explained(session, query)
    assert any(f"SEARCH {index}" in line or f"INDEX {index}" in line for line in plan), plan
    scans = [line for line in plan if line.startswith("SCAN") and "SCAN last" not in line]
    assert scans == [], plan


def explained(session: Session, query: Rows) -> list[str]:
    text = query.compile(session.get_bind(), compile_kwargs={"render_postcompile": True})
    values = tuple(text.params[name] for name in text.positiontup or ())
    plain = tuple(one.isoformat() if isinstance(one, dt.datetime) else one for one in values)
    rows = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", plain)
    return [str(row[3]) for row in rows]
