"""What devices say, through the handlers, on SQLite and PostgreSQL: kept, answered, or refused; never an exception."""

from __future__ import annotations

import datetime as dt
import sqlite3
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from agent.protocol.codec import decode, encode
from agent.protocol.facts import DeviceFacts
from agent.protocol.lifecycle import Phase
from agent.protocol.messages import (
    DeploymentReport,
    DesiredState,
    HostWindow,
    ModelWindow,
    Presence,
    ProbationReport,
    Problem,
    Reported,
    TelemetryAck,
    TelemetryBatch,
    TensorSketch,
)
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.trace import Mark, TraceReport
from agent.protocol.version import SPOKEN
from fleet_server import migrations, outbox
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices import service as devices
from fleet_server.enrolment.service import Authority
from fleet_server.gates import service as gates
from fleet_server.gateway.conduct import Conduct
from fleet_server.gateway.delivery import Delivery
from fleet_server.gateway.handlers import Handlers
from fleet_server.gateway.inbox import Message
from fleet_server.gateway.service import Gateway
from fleet_server.models import AuditEvent, Device, DeviceHolding, Fleet, ModelWindowRow
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rollouts.reminder import Reminder
from fleet_server.samples.receiving import Receiving
from fleet_server.settings import Settings
from fleet_server.telemetry import service as telemetry
from fleet_server.telemetry.signals import HOST, unpack_signals
from fleet_server.trust.ca import FleetCa

FACTS = DeviceFacts(
    agent_version="1",
    os="",
    kernel="",
    arch="x86_64",
    cpu_model="",
    cpu_cores=1,
    cpu_features=(),
    memory_mb=1024,
    disk_free_mb=1024,
)
WINDOW = ModelWindow("m", "1", "a" * 64, "d", "cpu", requests=1)
HELLO = Reported(protocol=SPOKEN, boot_id="b", sequence=1, revision=0, facts=FACTS)
BATCH = TelemetryBatch(SPOKEN, "spool", 1, 1.0, 2.0, (WINDOW,), HostWindow())


@pytest.fixture
def said() -> list[tuple[str, bytes]]:
    """What the server sent that is in no outbox."""
    return []


@pytest.fixture
def handlers(database: Database, tmp_path: Path, said: list[tuple[str, bytes]]) -> Handlers:
    authority = Authority(FleetCa.open(tmp_path / "ca", DEFAULT_FLEET), dt.timedelta(days=1), 10)
    store = ArtifactStore.open(None, folder=tmp_path)
    delivery = Delivery(store, lambda *_: False, None)
    receiving = Receiving(database, store.below("samples"), tmp_path)
    answer: Any = lambda *one: said.append(one)  # noqa: E731
    return Handlers(database, Settings(), delivery, authority, Conduct(database), receiving, answer)


def say(handlers: Handlers, leaf: DeviceTopic, message: Any, device: str = "dev-1") -> None:
    handlers.handle(Message(device_topic(device, leaf), encode(message)))


def report(**fields: Any) -> DeploymentReport:
    return msgspec.structs.replace(DeploymentReport("d", "m", "1", "a" * 64, Phase.ACTIVE), **fields)


PROBLEM = Problem("disk_full", "the disk is full", 1.0, 2.0)


POISON: tuple[Reported | TelemetryBatch, ...] = (
    msgspec.structs.replace(HELLO, boot_id="\0"),
    msgspec.structs.replace(HELLO, boot_id="x" * 500_000),
    msgspec.structs.replace(HELLO, sequence=1 << 40),
    msgspec.structs.replace(HELLO, sequence=-1 << 40),
    msgspec.structs.replace(HELLO, revision=1 << 40),
    msgspec.structs.replace(HELLO, revision=-1),
    msgspec.structs.replace(HELLO, deployments=(report(deployment_id="\0"),)),
    msgspec.structs.replace(HELLO, deployments=(report(received_bytes=1 << 70),)),
    msgspec.structs.replace(HELLO, deployments=(report(missing_chunks=1 << 40),)),
    msgspec.structs.replace(HELLO, deployments=(report(attempts=-1),)),
    msgspec.structs.replace(HELLO, deployments=(report(probation=ProbationReport(requests=-1)),)),
    msgspec.structs.replace(HELLO, deployments=(report(probation=ProbationReport(memory_mb=1e300)),)),
    msgspec.structs.replace(HELLO, deployments=(report(probation=ProbationReport(note="\0")),)),
    msgspec.structs.replace(HELLO, deployments=(report(probation=ProbationReport(provider="p" * 1000)),)),
    msgspec.structs.replace(HELLO, deployments=(report(trace=TraceReport("x" * 300)),)),
    msgspec.structs.replace(HELLO, deployments=(report(trace=TraceReport("", (Mark("load\0", 1.0),))),)),
    msgspec.structs.replace(HELLO, deployments=(report(trace=TraceReport("", (Mark("load", 1.0),) * 33)),)),
    msgspec.structs.replace(HELLO, problems=(PROBLEM,) * 17),
    msgspec.structs.replace(HELLO, problems=(msgspec.structs.replace(PROBLEM, detail="\0"),)),
    msgspec.structs.replace(HELLO, problems=(msgspec.structs.replace(PROBLEM, detail="x" * 3000),)),
    msgspec.structs.replace(HELLO, problems=(msgspec.structs.replace(PROBLEM, code="x" * 300),)),
    msgspec.structs.replace(HELLO, problems=(msgspec.structs.replace(PROBLEM, last_at=1e300),)),
    msgspec.structs.replace(HELLO, problems=(msgspec.structs.replace(PROBLEM, count=-1),)),
    msgspec.structs.replace(BATCH, spool_id="\0"),
    msgspec.structs.replace(BATCH, sequence=1 << 63),
    msgspec.structs.replace(BATCH, sequence=-1),
    msgspec.structs.replace(BATCH, models=(msgspec.structs.replace(WINDOW, model="\0"),)),
    msgspec.structs.replace(BATCH, models=(msgspec.structs.replace(WINDOW, version="v" * 10_000),)),
    msgspec.structs.replace(BATCH, models=(msgspec.structs.replace(WINDOW, provider="\0"),)),
)


def test_poison_is_refused_and_the_next_message_is_heard(
    handlers: Handlers, database: Database, said: list[tuple[str, bytes]]
) -> None:
    for number, poison in enumerate(POISON):
        name = f"dev-{number}"
        leaf = DeviceTopic.REPORTED if isinstance(poison, Reported) else DeviceTopic.TELEMETRY
        if leaf is DeviceTopic.TELEMETRY:
            say(handlers, DeviceTopic.REPORTED, HELLO, name)
        say(handlers, leaf, poison, name)
        with database.read() as session:
            assert (session.get(Device, name) is None) == (leaf is DeviceTopic.REPORTED), poison
            assert telemetry.summarize(session, DEFAULT_FLEET, device_id=name) == [], poison
        say(handlers, DeviceTopic.REPORTED, msgspec.structs.replace(HELLO, sequence=2), name)
        say(handlers, DeviceTopic.TELEMETRY, BATCH, name)
        with database.read() as session:
            assert session.get_one(Device, name).reported_sequence == 2
            assert len(telemetry.summarize(session, DEFAULT_FLEET, device_id=name)) == 1
        assert said.pop() == (device_topic(name, DeviceTopic.TELEMETRY_ACK), encode(TelemetryAck("spool", (1,))))
        assert said == []


def test_problems_of_a_device_are_shown(handlers: Handlers, database: Database) -> None:
    unknown = msgspec.structs.replace(
        PROBLEM, code="of_a_later_agent", count=3, ongoing=True, last_at=253_402_300_799.0
    )
    say(handlers, DeviceTopic.REPORTED, msgspec.structs.replace(HELLO, problems=(PROBLEM, unknown)))
    with database.read() as session:
        first, second = devices.device_view(session.get_one(Device, "dev-1"), None).problems
    assert (first.code, first.detail, first.count, first.ongoing) == ("disk_full", "the disk is full", 1, False)
    assert (second.code, second.count, second.ongoing, second.last_at.year) == ("of_a_later_agent", 3, True, 9999)
    say(handlers, DeviceTopic.REPORTED, msgspec.structs.replace(HELLO, sequence=2))
    with database.read() as session:
        assert devices.device_view(session.get_one(Device, "dev-1"), None).problems == []


def test_signals_of_a_window_are_kept_as_they_were_said(handlers: Handlers, database: Database) -> None:
    window = msgspec.structs.replace(
        WINDOW, confidence={31: 2, -1: 1}, predicted={7: 3}, inputs={"x": TensorSketch({-4: 1}, {0: 1})}, crashes=2
    )
    say(handlers, DeviceTopic.REPORTED, HELLO)
    say(handlers, DeviceTopic.TELEMETRY, msgspec.structs.replace(BATCH, models=(window, WINDOW)))
    with database.read() as session:
        rows = session.query(ModelWindowRow).order_by(ModelWindowRow.number).all()
        host = {name: value for name in HOST if (value := getattr(BATCH.host, name)) is not None}
        assert [unpack_signals(row.signals) for row in rows] == [
            {
                "confidence": {31: 2, -1: 1},
                "predicted": {7: 3},
                "inputs": {"x": {"mean": {-4: 1}, "deviation": {0: 1}}},
                "crashes": 2,
                **host,
            },
            host,
        ]


CLOCKS = [
    (0.0, 5.0),
    (5.0, 0.0),
    (1e300, -1e300),
    (float("nan"), 1.0),
    (1.0, float("nan")),
    (float("-inf"), float("inf")),
]


def test_a_clock_that_is_wrong_ends_its_windows_now(handlers: Handlers, database: Database) -> None:
    for number, (started, ended) in enumerate(CLOCKS):
        name = f"dev-{number}"
        before = utc_now()
        say(handlers, DeviceTopic.REPORTED, HELLO, name)
        batch = msgspec.structs.replace(BATCH, started_at=started, ended_at=ended)
        say(handlers, DeviceTopic.TELEMETRY, batch, name)
        with database.read() as session:
            (row,) = telemetry.summarize(session, DEFAULT_FLEET, device_id=name)
        assert before <= row.last_at <= utc_now(), (started, ended)
        assert row.first_at >= before - dt.timedelta(days=1)


def test_presence_of_an_unknown_device_and_an_emptied_topic_are_harmless(
    handlers: Handlers, database: Database
) -> None:
    say(handlers, DeviceTopic.PRESENCE, Presence(online=True, boot_id="b"))
    handlers.handle(Message(device_topic("dev-1", DeviceTopic.PRESENCE), b""))
    say(handlers, DeviceTopic.TELEMETRY, BATCH)
    with database.read() as session:
        assert session.get(Device, "dev-1") is None
        assert outbox.pending(session, limit=10) == []


def test_a_late_report_of_the_same_boot_changes_nothing(handlers: Handlers, database: Database) -> None:
    newer = msgspec.structs.replace(HELLO, sequence=5, facts=msgspec.structs.replace(FACTS, arch="aarch64"))
    for message in (newer, msgspec.structs.replace(HELLO, sequence=4), newer):
        say(handlers, DeviceTopic.REPORTED, message)
    with database.read() as session:
        assert session.get_one(Device, "dev-1").facts["arch"] == "aarch64"
    say(handlers, DeviceTopic.REPORTED, msgspec.structs.replace(HELLO, boot_id="the next"))
    with database.read() as session:
        assert session.get_one(Device, "dev-1").facts["arch"] == "x86_64"


def test_a_device_that_knows_a_later_revision_than_the_database_is_gone_past(
    handlers: Handlers, database: Database
) -> None:
    say(handlers, DeviceTopic.REPORTED, msgspec.structs.replace(HELLO, revision=41))
    with database.read() as session:
        (message,) = outbox.pending(session, limit=10)
    assert decode(message.payload, DesiredState).revision == 42


def test_a_device_that_does_not_say_that_it_heard_is_told_again(handlers: Handlers, database: Database) -> None:
    """The message to it, or its answer, was lost."""

    def queued() -> list[DesiredState]:
        with database.write() as session:
            found = outbox.pending(session, limit=10)
            outbox.acknowledge(session, [one.id for one in found])
        return [decode(one.payload, DesiredState) for one in found if one.topic.endswith(f"/{DeviceTopic.DESIRED}")]

    for device in ("behind", "current", "gone"):
        say(handlers, DeviceTopic.REPORTED, HELLO, device)
    with database.write() as session:
        for device in ("behind", "gone"):
            session.get_one(Device, device).desired_revision = 3
        session.get_one(Device, "gone").online = False
    reminder = Reminder(database, Settings())
    assert [reminder.tick(now) for now in (0, 59, 60, 61, 179, 180)] == [0, 0, 1, 0, 0, 1]
    assert [one.revision for one in queued()] == [3]
    with database.read() as session:
        assert session.get_one(Device, "behind").desired_revision == 3
    say(handlers, DeviceTopic.REPORTED, msgspec.structs.replace(HELLO, sequence=2, revision=3), "behind")
    assert reminder.tick(10_000) == 0
    other = Reminder(database, Settings())
    with database.write() as session:
        session.get_one(Device, "behind").desired_revision = 4
    assert [other.tick(0), other.tick(60)] == [0, 0], "another server has the lease"
    reminder.stop()
    assert [other.tick(60), other.tick(120)] == [0, 1]


def test_a_message_waits_for_a_database_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_server.db.BUSY_TIMEOUT_S", 0.1)
    settings = Settings(state_dir=tmp_path, broker_url="mqtt://127.0.0.1:1")
    migrations.upgrade(settings.effective_database_url)
    database = Database(settings.effective_database_url)
    with database.write() as session:
        session.add(Fleet(id=DEFAULT_FLEET))
    authority = Authority(FleetCa.open(tmp_path / "ca", DEFAULT_FLEET), dt.timedelta(days=1), 10)
    gateway = Gateway(settings, database, ArtifactStore.open(None, folder=tmp_path / "artifacts"), authority)
    other = sqlite3.connect(tmp_path / "shoal.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # as another process does while it writes
    thread = threading.Timer(1.0, other.rollback)
    thread.start()
    gateway._inbox.put(Message(device_topic("dev-1", DeviceTopic.REPORTED), encode(HELLO)))
    gateway._handle_next()
    thread.join()
    other.close()
    with database.read() as session:
        assert session.get_one(Device, "dev-1").online
    database.dispose()


def test_of_reports_that_are_taken_in_together_one_that_fails_is_undone_alone(
    handlers: Handlers, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = gates.apply_reports

    def failing(session: Any, taken: Any, *rest: Any) -> set[str]:
        told = usual(session, taken, *rest)
        if any(device.id == "dev-1" for device, _ in taken):
            session.flush()
            raise RuntimeError("it can't be taken in")
        return told

    monkeypatch.setattr("fleet_server.gateway.reports.gates.apply_reports", failing)
    whole = [Message(device_topic(f"dev-{number}", DeviceTopic.REPORTED), encode(HELLO)) for number in range(3)]
    rubbish = Message(device_topic("dev-3", DeviceTopic.REPORTED), b"rubbish")
    handlers.handle_reports([whole[0], rubbish, *whole[1:]])
    with database.read() as session:
        assert [session.get(Device, f"dev-{number}") is not None for number in range(4)] == [True, False, True, False]
        noted = [one.subject for one in session.query(AuditEvent).order_by(AuditEvent.sequence)]
    assert noted == ["device/dev-0", "device/dev-2"], "each once, though they were tried twice"


@pytest.mark.parametrize(
    ("error", "tries"),
    [(RuntimeError("it can't be taken in"), 1), (IntegrityError("insert", {}, ValueError("unique")), 2)],
    ids=["whatever is wrong", "another server has registered it"],
)
def test_a_report_that_came_alone_is_tried_again_only_where_that_may_help(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, tries: int
) -> None:
    tried = []

    def failing(*_: Any) -> set[str]:
        tried.append(1)
        raise error

    monkeypatch.setattr("fleet_server.gateway.reports.gates.apply_reports", failing)
    say(handlers, DeviceTopic.REPORTED, HELLO)
    assert len(tried) == tries
    assert [one.message for one in caplog.records] == ["a report of device dev-1 could not be taken in"]


@pytest.mark.parametrize("again", [False, True], ids=["registers", "has another address"])
def test_a_hundred_reports_ask_the_database_as_often_as_ten(
    handlers: Handlers, database: Database, *, again: bool
) -> None:
    def statements(devices: int, address: str, sequence: int) -> int:
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        facts = msgspec.structs.replace(HELLO.facts, balancing_lan="plant", balancing_address=address)
        said = msgspec.structs.replace(HELLO, facts=facts, sequence=sequence, held=("0" * 64, address[-1] * 64))
        event.listen(database.engine, "before_cursor_execute", counted)
        handlers.handle_reports(
            [Message(device_topic(f"of-{devices}-{one}", DeviceTopic.REPORTED), encode(said)) for one in range(devices)]
        )
        event.remove(database.engine, "before_cursor_execute", counted)
        return count

    few, many = statements(10, "https://a", 1), statements(100, "https://b", 1)
    if again:
        few, many = statements(10, "https://c", 2), statements(100, "https://d", 2)
    assert many <= few + 2
    with database.read() as session:
        told = {one.facts["balancing_address"] for one in session.query(Device)}
        assert told == ({"https://c", "https://d"} if again else {"https://a", "https://b"})
        assert session.query(DeviceHolding).count() == 2 * 110


def test_what_was_said_before_another_boot_is_stale_however_late_it_comes(
    database: Database, handlers: Handlers
) -> None:
    """Of several servers one may have it in its session at the broker until it is started again."""
    for boot, sequence, revision in (("b", 5, 1), ("c", 1, 2), ("d", 1, 3), ("b", 6, 4), ("c", 9, 4), ("d", 2, 5)):
        known = msgspec.structs.replace(HELLO, boot_id=boot, sequence=sequence, revision=revision)
        say(handlers, DeviceTopic.REPORTED, known)
    with database.read() as session:
        device = session.get_one(Device, "dev-1")
        assert (device.boot_id, device.reported_revision) == ("d", 5)
        assert device.earlier_boots == ["b", "c"]


def test_a_device_that_spoke_when_nobody_listened_is_asked(handlers: Handlers, said: list[tuple[str, bytes]]) -> None:
    topic, here = device_topic("dev-1", DeviceTopic.PRESENCE), encode(Presence(online=True, boot_id="b"))
    handlers.handle(Message(topic, here))
    handlers.handle(Message(topic, encode(Presence(online=False, boot_id="b")), retained=True))
    assert said == [], "one that says so now reports next, and one that is gone can't"
    handlers.handle(Message(topic, here, retained=True))
    ((asked, body),) = said
    assert asked == device_topic("dev-1", DeviceTopic.DESIRED)
    assert decode(body, DesiredState).revision == 0
    say(handlers, DeviceTopic.REPORTED, HELLO)
    handlers.handle(Message(topic, here, retained=True))
    assert len(said) == 1, "it is known"


def told_peers(database: Database) -> dict[str, tuple[str, ...]]:
    """What is to be sent, by device; it counts as sent."""
    with database.write() as session:
        found = outbox.pending(session, limit=100)
        outbox.acknowledge(session, [one.id for one in found])
        return {one.topic.split("/")[4]: decode(one.payload, DesiredState).peers for one in found}


def test_devices_that_name_the_same_lan_are_told_of_each_other(handlers: Handlers, database: Database) -> None:
    sequences = iter(range(1, 100))

    def says(device: str, lan: str, address: str = "") -> dict[str, tuple[str, ...]]:
        """Who is told which peers when a device reports what its owner configured."""
        with database.read() as session:
            known = session.get(Device, device)
            revision = known.desired_revision if known is not None else 0
        facts = msgspec.structs.replace(FACTS, balancing_lan=lan, balancing_address=address)
        sequence = next(sequences)
        said = msgspec.structs.replace(HELLO, sequence=sequence, revision=revision, facts=facts)
        say(handlers, DeviceTopic.REPORTED, said, device)
        return told_peers(database)

    assert says("one", "hall", "10.0.0.1:8473") == {"one": ()}
    assert says("two", "hall", "10.0.0.2:8473") == {"one": ("10.0.0.2:8473",), "two": ("10.0.0.1:8473",)}
    assert says("three", "yard", "10.0.0.3:8473") == {"three": ()}
    assert says("four", "hall")["four"] == ("10.0.0.1:8473", "10.0.0.2:8473")  # it asks, and answers nobody
    assert says("four", "hall") == {}, "nothing has changed"
    assert says("two", "yard", "10.0.0.2:8473") == {
        "one": (),
        "two": ("10.0.0.3:8473",),
        "three": ("10.0.0.2:8473",),
        "four": ("10.0.0.1:8473",),
    }
    assert says("two", "") == {"two": (), "three": ()}, "its owner took that out"
