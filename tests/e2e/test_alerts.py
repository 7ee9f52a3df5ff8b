"""Alerts, end to end: a real agent that is killed and comes back, broker, webhook, mail server, listener."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from fleet_server.cli.main import app
from tests.cli import CliRunner
from tests.fleet import LocalFleet, wait_until
from tests.integration.test_webhooks import Receiver, receiving
from tests.mail_sink import MailSink, mail_sink

QUICK = {"wait_s": 0, "interval_s": 0}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def sink() -> Iterator[MailSink]:
    with mail_sink() as found:
        yield found


@pytest.fixture
def fleet(tmp_path: Path, sink: MailSink) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path)
    try:
        start(fleet, sink)
        yield fleet
    finally:
        fleet.stop()


def start(fleet: LocalFleet, sink: MailSink) -> None:
    mail = {"HOST": "127.0.0.1", "PORT": str(sink.port), "SECURITY": "none", "FROM": "shoal@example.org"}
    fleet.start_server(
        SHOAL_ALERT_TICK_S="0.3",
        SHOAL_WEBHOOK_ALLOW_PRIVATE="true",
        **{f"SHOAL_SMTP_{name}": value for name, value in mail.items()},
    )


@pytest.fixture
def messages(fleet: LocalFleet) -> Iterator[queue.Queue[dict[str, Any]]]:
    """What a program hears that listens to the fleet's alerts."""
    heard: queue.Queue[dict[str, Any]] = queue.Queue()
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_message = lambda _c, _d, message: heard.put(json.loads(message.payload))
    client.on_connect = lambda connected, *_: connected.subscribe("shoal/v1/alerts/+", 1)
    client.connect("127.0.0.1", fleet.broker_port)
    client.loop_start()
    yield heard
    client.disconnect()
    client.loop_stop()


def told(receiver: Receiver) -> list[tuple[str, str, list[str]]]:
    return [
        (one["type"], one["data"]["rule"], [alert["subject"] for alert in one["data"]["alerts"]])
        for one in receiver.events("/alerts")
    ]


def test_a_device_that_goes_and_comes_back_is_told_by_every_way(
    fleet: LocalFleet, receiver: Receiver, sink: MailSink, messages: queue.Queue[dict[str, Any]]
) -> None:
    fleet.start_agent("cam-1")
    wait_until("the device", lambda: [one["online"] for one in fleet.get("/devices")["items"]] == [True])
    wait_until("what is shipped", lambda: fleet.get("/alert-routes")["items"])
    assert {one["name"] for one in fleet.get("/alert-rules")["items"]} >= {"offline", "drift", "rollout-stuck"}
    fleet.post("/webhooks", {"url": f"{receiver.url}/alerts", "types": ["shoal.alert.*"]})
    fleet.api.patch("/alert-rules/offline", json={"for_s": 1}).raise_for_status()
    fleet.api.patch("/alert-routes/webhooks", json=QUICK).raise_for_status()
    fleet.post("/alert-routes", {"name": "pager", "kind": "email", "to": ["ops@example.org"], **QUICK})
    fleet.post("/alert-routes", {"name": "bus", "kind": "mqtt", **QUICK})

    fleet.kill("cam-1")
    wait_until("the webhook", lambda: told(receiver) == [("shoal.alert.firing", "offline", ["device/cam-1"])])
    counts = fleet.get("/alert-counts")
    assert (counts["firing"], counts["unacknowledged"]) == (1, 1)
    assert messages.get(timeout=20)["state"] == "firing"
    wait_until("the e-mail", lambda: sink.got)
    assert sink.got[0]["Subject"] == "[shoal default] 1 firing: offline (warning)"
    assert "device/cam-1" in sink.got[0].get_content()

    environment = {"SHOAL_URL": fleet.url, "SHOAL_TOKEN": fleet.token, "COLUMNS": "200"}
    listed = CliRunner().invoke(app, ["alert", "ls", "-o", "json"], env=environment)
    alert = json.loads(listed.stdout)[0]
    assert (alert["rule"], alert["subject"], alert["state"]) == ("offline", "device/cam-1", "firing")
    done = CliRunner().invoke(app, ["alert", "ack", alert["id"], "--comment", "on my way"], env=environment)
    assert done.exit_code == 0, done.output
    assert fleet.get("/alert-counts")["unacknowledged"] == 0

    fleet.kill("server")  # what it did not tell yet, it tells when it is back
    fleet.end_leases()
    fleet.start_agent("cam-1")
    start(fleet, sink)
    wait_until("the device", lambda: [one["online"] for one in fleet.get("/devices")["items"]] == [True])
    wait_until("the webhook", lambda: told(receiver)[1:] == [("shoal.alert.resolved", "offline", ["device/cam-1"])])
    wait_until("the second e-mail", lambda: len(sink.got) == 2)
    found = fleet.get(f"/alerts/{alert['id']}")
    assert (found["state"], found["comment"]) == ("resolved", "on my way")


def test_the_command_line(fleet: LocalFleet, tmp_path: Path) -> None:
    environment = {"SHOAL_URL": fleet.url, "SHOAL_TOKEN": fleet.token, "COLUMNS": "250"}
    fleet.start_agent("cam-1")
    wait_until("the device", lambda: fleet.get("/devices")["items"])
    wait_until("what is shipped", lambda: fleet.get("/alert-routes")["items"])

    def shoal(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, list(words), env=environment)
        assert done.exit_code == code, done.output
        return done.output

    def shown(*words: str) -> Any:
        return json.loads(shoal(*words, "-o", "json"))

    of_rule = ("--above", "50", "--clear", "40", "--for", "5m", "--query", "id==cam-*", "--window", "10m")
    made = shown("alert", "rule", "create", "slow", "--metric", "latency_p95_ms", *of_rule)
    assert (made["threshold"], made["clear"], made["for_s"], made["window_s"]) == (50, 40, 300, 600)
    assert shown("alert", "rule", "change", "slow", "--disable", "--severity", "critical")["enabled"] is False
    shoal("alert", "rule", "change", "slow", code=2)
    shoal("alert", "rule", "change", "slow", "--for", "soon", code=2)
    shoal("alert", "rule", "create", "both", "--metric", "cpu_percent", "--above", "1", "--below", "2", code=2)
    assert "latency_p95_ms > 50 ms" in shoal("alert", "rule", "ls")
    assert shown("alert", "rule", "show", "slow")["severity"] == "critical"
    shoal("alert", "rule", "delete", "slow", "--yes")
    shoal("alert", "rule", "show", "slow", code=4)

    route = shown("alert", "route", "create", "bus", "--kind", "mqtt", "--rule", "offline", "--repeat", "1d")
    assert (route["rules"], route["repeat_s"]) == (["offline"], 86_400)
    assert shown("alert", "route", "change", "bus", "--disable", "--severity", "warning")["enabled"] is False
    assert "bus" in shoal("alert", "route", "ls")
    assert "shoal/v1/alerts/default" in shoal("alert", "route", "test", "bus")
    assert shown("alert", "route", "show", "bus")["least_severity"] == "warning"
    shoal("alert", "route", "delete", "bus", "--yes")

    silence = shown("alert", "silence", "create", "--rule", "offline", "--for", "3h", "--comment", "power works")
    assert "power works" in shoal("alert", "silence", "ls")
    assert shown("alert", "silence", "show", silence["id"])["active"]
    shoal("alert", "silence", "end", silence["id"])
    assert "nothing is silenced" in shoal("alert", "silence", "ls")
    assert "nothing" in shoal("alert", "ls")
    assert "nothing" in shoal("alert", "counts")

    shoal("broker", "listener", "--out", str(tmp_path / "listener"))
    assert {one.name for one in (tmp_path / "listener").iterdir()} == {"alerts.key", "alerts.pem", "ca.pem"}
