"""Commands on the server: sent, answered, streamed, ended in time; on SQLite and PostgreSQL, without a broker."""

from __future__ import annotations

import datetime as dt
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from sqlalchemy import select
from starlette.testclient import TestClient

from agent.protocol.codec import decode
from agent.protocol.commands import (
    Command,
    CommandAnswer,
    CommandPhase,
    CommandResult,
    LogLine,
    ModelBenchmark,
)
from agent.protocol.facts import DeviceFacts
from agent.protocol.messages import Presence, Reported
from agent.protocol.version import SPOKEN
from fleet_server.clock import utc_now
from fleet_server.commands import receiving, schemas, sending, service, streaming
from fleet_server.commands.keeper import CommandKeeper
from fleet_server.db import Database
from fleet_server.devices import reports
from fleet_server.models import AuditEvent, CommandLogLine, DeviceCommand, OutboxMessage, Webhook, WebhookDelivery
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from tests import rest
from tests.integration.test_api import refused
from tests.reporting import record_report

KNOWN = {"restart-runtime": True, "logs": True, "benchmark": True, "facts": True, "identify": False}


def register(database: Database, device_id: str = "d", **facts: Any) -> None:
    plain = DeviceFacts(
        agent_version="1", os="", kernel="", arch="x86_64", cpu_model="", cpu_cores=1, cpu_features=(), memory_mb=1,
        disk_free_mb=1, features=("commands",), commands=KNOWN,
    )  # fmt: skip
    said = msgspec.structs.replace(plain, **facts)
    with database.write() as session:
        record_report(session, device_id, Reported(SPOKEN, "b", 1, 0, said), utc_now())


def online(database: Database, device_id: str = "d", *, is_online: bool = True) -> None:
    with database.write() as session:
        reports.record_presence(session, [(device_id, Presence(is_online, "b"))], utc_now())
        if is_online:
            sending.send_open(session, [device_id], utc_now())


def ask(database: Database, kind: str = "facts", **fields: Any) -> str:
    with database.write() as session:
        wanted = schemas.CommandSpec.model_validate({"kind": kind, **fields})
        return service.command_device(session, DEFAULT_FLEET, "d", wanted, actor="t").id


def sent(database: Database) -> list[Command]:
    with database.read() as session:
        rows = session.scalars(select(OutboxMessage).order_by(OutboxMessage.id)).all()
        assert all(row.topic.endswith("/d/d/rpc/command") for row in rows)
        return [decode(row.payload, Command) for row in rows]


def row_of(database: Database, command_id: str) -> DeviceCommand:
    with database.read() as session:
        return session.get_one(DeviceCommand, command_id)


def answer(database: Database, command_id: str, phase: str = "running", *, device: str = "d", **fields: Any) -> None:
    with database.write() as session:
        receiving.take(session, device, CommandAnswer(command_id, CommandPhase(phase), **fields), utc_now())


def line(sequence: int, text: str = "x", level: str = "INFO") -> LogLine:
    return LogLine(sequence, 1.0, level, "agent", "agent.mqtt", text)


def test_a_command_is_sent_answered_and_told_of(database: Database) -> None:
    with database.write() as session:
        hook = Webhook(fleet_id=DEFAULT_FLEET, url="http://127.0.0.1:9/", types=["shoal.*"], secret="", created_by="")
        session.add(hook)
    register(database)
    command_id = ask(database, "benchmark", seconds=2.0, models=["m"], timeout_s=60)
    (told,) = sent(database)
    assert (told.command_id, told.kind, told.cancel) == (command_id, "benchmark", False)
    assert (told.arguments.seconds, told.arguments.models) == (2.0, ("m",))
    assert 55 < told.timeout_s <= 60
    assert abs(told.expires_at - time.time() - 60) < 5
    assert row_of(database, command_id).state == "sent"
    answer(database, command_id, device="e")
    assert row_of(database, command_id).state == "sent", "another device's word counts for nothing"
    answer(database, command_id)
    assert (row_of(database, command_id).state, row_of(database, command_id).finished_at) == ("running", None)
    result = CommandResult(benchmarks=(ModelBenchmark("m", "1", latency_p50_ms=1.5),))
    for _ in range(2):
        answer(database, command_id, "succeeded", result=result)
    answer(database, command_id, "failed", code="internal")
    row = row_of(database, command_id)
    assert (row.state, row.code) == ("succeeded", "")
    assert row.result == {"benchmarks": [{"model": "m", "version": "1", "latency_p50_ms": 1.5}]}
    with database.read() as session:
        (event,) = [json.loads(one.body) for one in session.scalars(select(WebhookDelivery))]
        assert (event["type"], event["data"]["state"]) == ("shoal.command.finished", "succeeded")
        actions = [
            (one.action, one.actor)
            for one in session.scalars(select(AuditEvent).order_by(AuditEvent.sequence))
            if one.action.startswith("command.")
        ]
        assert actions == [("command.create", "t"), ("command.finish", "d")]


def test_one_for_a_device_that_is_away_waits_until_it_comes_or_its_time_is_over(database: Database) -> None:
    register(database)
    online(database, is_online=False)
    late, kept = ask(database, timeout_s=1.0), ask(database, timeout_s=3600)
    assert sent(database) == []
    with database.write() as session:
        assert service.expire(session, utc_now() + dt.timedelta(seconds=2)) == 1
    row = row_of(database, late)
    assert (row.state, row.code) == ("timed_out", "timeout")
    assert "did not come online" in row.detail
    online(database)
    online(database)
    assert [one.command_id for one in sent(database)] == [kept, kept], "at each connection"
    assert row_of(database, kept).state == "sent"


def test_what_nothing_is_heard_of_is_sent_again_and_ends_after_its_device_had_the_last_word(database: Database) -> None:
    register(database)
    command_id = ask(database, timeout_s=100)
    now = utc_now()
    with database.write() as session:
        assert service.send_again(session, now) == 0
        assert service.send_again(session, now + dt.timedelta(seconds=40)) == 1
    assert [one.timeout_s < 61 for one in sent(database)] == [False, True]
    answer(database, command_id)
    with database.write() as session:
        assert service.expire(session, now + dt.timedelta(seconds=102)) == 0
        assert service.expire(session, now + dt.timedelta(seconds=107)) == 1
    assert "did not say how it ended" in row_of(database, command_id).detail
    assert sent(database)[-1].cancel
    count = len(sent(database))
    answer(database, command_id)
    assert len(sent(database)) == count + 1, "one that goes on with what is over is told again"
    assert sent(database)[-1].cancel


def test_a_cancelled_one_is_over_at_once(database: Database) -> None:
    register(database)
    online(database, is_online=False)
    waiting = ask(database)
    online(database)
    going = ask(database, "logs", follow=True)
    count = len(sent(database))
    with database.write() as session:
        for one in (waiting, going):
            service.cancel(session, session.get_one(DeviceCommand, one), actor="t")
    assert [(one.command_id, one.cancel) for one in sent(database)[count:]] == [(waiting, True), (going, True)]
    answer(database, going, lines=(line(1),))
    assert (row_of(database, going).state, row_of(database, going).log_lines) == ("cancelled", 0)


def test_each_line_counts_once_and_the_newest_of_very_many_are_kept(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "MOST_LINES", 5)
    register(database)
    command_id = ask(database, "logs", follow=True)
    answer(database, command_id, lines=(line(3), line(4, "bad \x1b[31m")))
    answer(database, command_id, lines=(line(3), line(4), line(7)), dropped=2)
    row = row_of(database, command_id)
    assert (row.state, row.log_lines, row.log_dropped, row.log_sequence) == ("running", 3, 2, 7)
    with database.read() as session:
        found = session.scalars(select(CommandLogLine).order_by(CommandLogLine.sequence)).all()
        assert [(one.sequence, one.text) for one in found] == [(3, "x"), (4, "bad ?[31m"), (7, "x")]
    answer(database, command_id, lines=tuple(line(number) for number in range(8, 14)))
    with database.read() as session:
        found = session.scalars(select(CommandLogLine).order_by(CommandLogLine.sequence)).all()
        assert [one.sequence for one in found] == [9, 10, 11, 12, 13]
    other = ask(database, "facts")
    answer(database, other, lines=(line(1),))
    assert row_of(database, other).log_lines == 0, "nobody asked for them"


def test_what_is_over_is_forgotten_in_time(database: Database) -> None:
    register(database)
    done, still = ask(database, "logs"), ask(database, timeout_s=86_400)
    answer(database, done, "succeeded", lines=(line(1),), result=CommandResult(lines=1))
    keeper = CommandKeeper(database, Settings(commands_days=1.0))
    keeper.tick(utc_now() + dt.timedelta(hours=23))
    assert row_of(database, done).state == "succeeded"
    keeper.tick(utc_now() + dt.timedelta(days=3))
    with database.read() as session:
        assert session.get(DeviceCommand, done) is None
        assert session.scalars(select(CommandLogLine)).all() == []
    assert row_of(database, still).state == "timed_out"


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    with rest.serving(tmp_path_factory.mktemp("state"), None) as found:
        register(found.state.database)
        register(found.state.database, "old", features=(), commands={})
        register(found.state.database, "newer", commands={"explode": True})
        yield found


@pytest.fixture
def api(application: FastAPI) -> TestClient:
    return rest.caller(application)


def test_a_device_that_can_not_or_may_not_is_not_asked(api: TestClient) -> None:
    assert refused(api.post("/devices/none/commands", json={"kind": "facts"}), 404, "device_not_found")
    for device in ("old", "newer"):
        problem = refused(api.post(f"/devices/{device}/commands", json={"kind": "facts"}), 409, "agent_too_old")
        assert "upgrade it" in problem["detail"]
    problem = refused(api.post("/devices/d/commands", json={"kind": "identify"}), 409, "command_not_allowed")
    assert "commands.identify = false" in problem["detail"]
    assert "seconds says nothing to logs" in refused(
        api.post("/devices/d/commands", json={"kind": "logs", "seconds": 3}), 422, "invalid"
    )["detail"]  # fmt: skip
    refused(api.post("/devices/d/commands", json={"kind": "explode"}), 422, "invalid")
    refused(api.post("/commands", json={"kind": "facts"}), 422, "no_device")
    refused(api.post("/commands", json={"kind": "facts", "query": "id=="}), 422, "bad_query")
    made = api.post("/commands", json={"kind": "facts", "query": "id==d,id==old"}).json()
    assert {one["device_id"]: (one["state"], one["code"]) for one in made} == {
        "d": ("sent", ""), "old": ("refused", "agent_too_old"),
    }  # fmt: skip
    for _ in range(schemas.MOST_OPEN - 1):
        assert api.post("/devices/d/commands", json={"kind": "facts"}).status_code == 201
    refused(api.post("/devices/d/commands", json={"kind": "facts"}), 409, "too_many_commands")
    for one in api.get("/commands", params={"device": "d", "limit": 500}).json()["items"]:
        cancelled = api.post(f"/commands/{one['id']}/cancel")
        assert cancelled.json()["state"] == "cancelled"
        refused(api.post(f"/commands/{one['id']}/cancel"), 409, "command_over")
    assert api.get("/commands", params={"state": "sent"}).json()["items"] == []


def events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(row.split(": ", 1) for row in block.split("\n") if row and not row.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
            assert fields.get("id", str(found[-1][1].get("sequence"))) == str(found[-1][1].get("sequence"))
    return found


def test_a_log_is_streamed_as_it_comes_and_from_where_a_client_was_cut_off(
    api: TestClient, application: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = application.state.database
    command = api.post("/devices/d/commands", json={"kind": "logs", "follow": True}).json()["id"]

    def device() -> None:
        answer(database, command, lines=(line(1, "one"), line(2, "two")))
        time.sleep(1.0)
        answer(database, command, lines=(line(5, "five", "ERROR"),))
        answer(database, command, "succeeded", result=CommandResult(lines=3))

    thread = threading.Thread(target=device)
    thread.start()
    streamed = api.get(f"/commands/{command}/logs")
    thread.join()
    assert streamed.headers["content-type"].startswith("text/event-stream")
    found = events(streamed.text)
    assert [(kind, data.get("text")) for kind, data in found] == [
        ("line", "one"), ("line", "two"), ("line", "five"), ("end", None),
    ]  # fmt: skip
    assert (found[-1][1]["state"], found[-1][1]["log_lines"]) == ("succeeded", 3)
    again = events(api.get(f"/commands/{command}/logs", headers={"Last-Event-ID": "2"}).text)
    assert [data.get("sequence") for _, data in again] == [5, None]
    refused(api.get(f"/commands/{command}/logs", headers={"Last-Event-ID": "x"}), 422, "bad_event_id")
    page = api.get(f"/commands/{command}/log-lines", params={"limit": 2}).json()
    assert [one["text"] for one in page["items"]] == ["one", "two"]
    errors = api.get(f"/commands/{command}/log-lines", params={"level": "WARNING"}).json()["items"]
    assert [one["text"] for one in errors] == ["five"]
    monkeypatch.setattr(streaming, "MOST", 0)
    refused(api.get(f"/commands/{command}/logs"), 503, "too_many_streams")
    monkeypatch.undo()
    assert api.get(f"/commands/{command}/logs").status_code == 200, "places are given back"


def test_streams_read_many_lines_in_pieces(api: TestClient, application: FastAPI, tmp_path: Path) -> None:
    database = application.state.database
    command = api.post("/devices/d/commands", json={"kind": "logs"}).json()["id"]
    for start in range(1, 1201, 200):
        answer(database, command, lines=tuple(line(start + one) for one in range(200)))
    answer(database, command, "succeeded")
    found = events(api.get(f"/commands/{command}/logs").text)
    assert [data["sequence"] for kind, data in found if kind == "line"] == list(range(1, 1201))
    assert found[-1][0] == "end"
