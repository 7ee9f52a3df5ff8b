"""Telemetry in the database: stored once by however many, rolled up and removed without a loss. On both databases."""

from __future__ import annotations

import datetime as dt
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import OperationalError

from agent.protocol.messages import HostWindow, ModelWindow, TelemetryBatch
from agent.protocol.version import SPOKEN
from fleet_server.clock import utc_now
from fleet_server.db import Base, Database
from fleet_server.errors import InvalidError
from fleet_server.models import (
    Device,
    DeviceIdentity,
    HostWindowRow,
    ModelWindowRow,
    TelemetryBatchRow,
    TelemetryGroup,
    TelemetryRollup,
)
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from fleet_server.telemetry import ingest, keeping, rollups, series, service
from fleet_server.telemetry.ingest import Ingest, Sent, store_group
from fleet_server.telemetry.keeper import TelemetryKeeper
from fleet_server.telemetry.repository import WindowFilter
from fleet_server.telemetry.schemas import ModelTelemetry
from tests.integration.test_database_rules import register

NOW = utc_now().replace(minute=20, second=0, microsecond=0)
HOUR = dt.timedelta(hours=1)
DAY = dt.timedelta(days=1)


def sent(
    device: str, sequence: int, ended: dt.datetime = NOW, *, spool: str = "s", version: str = "1", requests: int = 1
) -> Sent:
    latency, cells = {100 + sequence % 50: requests}, ((0, sequence % 2, requests),)
    window = ModelWindow("m", version, "a" * 64, f"{device}-{version}", "cpu", requests, 0, 0, requests, latency, cells)
    host = HostWindow(cpu_percent=float(sequence % 100))
    end = ended.timestamp()
    return Sent(device, TelemetryBatch(SPOKEN, spool, sequence, end - 10, end, (window,), host))


def rows(database: Database, table: type[Base]) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def requests(database: Database, **wanted: object) -> int:
    with database.read() as session:
        return sum(one.requests for one in service.summarize(session, DEFAULT_FLEET, **wanted))  # type: ignore[arg-type]


def summary(database: Database, **wanted: object) -> list[ModelTelemetry]:
    with database.read() as session:
        return service.summarize(session, DEFAULT_FLEET, **wanted)  # type: ignore[arg-type]


def store(database: Database, *batches: Sent, at: dt.datetime = NOW) -> list[Sent]:
    with database.write() as session:
        return store_group(session, batches, at)


def roll_up(database: Database, before: dt.datetime = NOW + DAY) -> None:
    done = 1
    while done:
        with database.write() as session:
            done = rollups.roll_up_windows(session, before)


def test_a_group_stores_each_batch_once_and_answers_for_all(database: Database) -> None:
    register(database, "a")
    register(database, "b")
    one, two, other = sent("a", 1), sent("a", 2), sent("b", 1)
    ingest = Ingest(database)
    assert ingest.store([one, two, one, other, sent("nobody", 1)]) == [one, two, one, other]
    assert ingest.store([two, one]) == [two, one]
    assert ingest.store([]) == []
    assert requests(database) == 3
    assert (rows(database, HostWindowRow), rows(database, ModelWindowRow), rows(database, TelemetryGroup)) == (3, 3, 1)


def test_a_locked_out_device_is_not_heard(database: Database) -> None:
    register(database, "a")
    with database.write() as session:
        values = {"device_id": "a", "fleet_id": DEFAULT_FLEET, "created_by": "test", "revoked_at": utc_now()}
        session.add(DeviceIdentity(**values))
    assert Ingest(database).store([sent("a", 1)]) == []
    assert rows(database, TelemetryBatchRow) == 0


def test_one_batch_that_the_database_refuses_takes_no_other_with_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(database, "a")
    batches = [sent("a", number) for number in range(1, 12)]
    huge = msgspec.structs.replace(batches[6].batch.models[0], requests=1 << 70)  # the decoder lets none of these in
    batches[6] = Sent("a", msgspec.structs.replace(batches[6].batch, models=(huge,)))
    assert Ingest(database).store(batches) == batches[:6] + batches[7:]
    assert requests(database) == 10

    def broken(*_: object) -> None:
        raise OperationalError("insert", {}, Exception("the disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "insert_rows", broken)
        with pytest.raises(OperationalError):
            Ingest(database).store([sent("a", 20)])
    assert Ingest(database).store([sent("a", 20)]) == [sent("a", 20)]
    assert requests(database) == 11


def test_series_that_are_gone_are_made_again(database: Database) -> None:
    register(database, "a")
    ingest = Ingest(database)
    assert ingest.store([sent("a", 1)])
    with database.write() as session:
        session.execute(text("DELETE FROM model_windows"))
        session.execute(text("DELETE FROM telemetry_series"))
    assert len(ingest.store([sent("a", 2), sent("a", 3)])) == 2
    assert requests(database) == 2


def test_many_servers_that_are_sent_the_same_store_it_once(database: Database) -> None:
    """Each gets everything, in an order of its own, while the names of what is in are moved to the spools."""
    devices = [f"dev-{number}" for number in range(5)]
    for device in devices:
        register(database, device)
    everything = [sent(device, number) for device in devices for number in range(1, 61)]

    def server(seed: int) -> int:
        mine = random.Random(seed).sample(everything, len(everything))
        ingest, answered = Ingest(database), 0
        for start in range(0, len(mine), 25):
            group = mine[start : start + 25]
            while True:
                with suppress(OperationalError):
                    answered += len(ingest.store(group))
                    break
        return answered

    def keeper(_: int) -> int:
        for _round in range(30):
            with database.write() as session:
                rollups.roll_up_windows(session, NOW + DAY)
        return 0

    with ThreadPoolExecutor(4) as pool:
        answered = list(pool.map(lambda call: call[0](call[1]), [(server, 1), (server, 2), (server, 3), (keeper, 0)]))
    assert answered == [300, 300, 300, 0]
    roll_up(database)
    assert [one.requests for one in summary(database)] == [60] * 5
    assert rows(database, HostWindowRow) == 300
    assert Ingest(database).store(everything[:50]) == everything[:50]
    assert requests(database) == 300
    assert rows(database, TelemetryBatchRow) == 0


def test_rolling_up_changes_no_sum(database: Database) -> None:
    """Whole hours, parts of hours, devices, versions: the same before, halfway, after, and as days."""
    for device in ("a", "b"):
        register(database, device)
    rng = random.Random(3)
    batches = [
        sent(device, number, NOW - dt.timedelta(minutes=7 * number), version=str(1 + number % 2), requests=number)
        for device in ("a", "b")
        for number in range(1, 60)
    ]
    rng.shuffle(batches)
    for start in range(0, len(batches), 11):
        store(database, *batches[start : start + 11])
    questions: list[dict[str, object]] = [
        {}, {"by_device": False}, {"device_id": "a"}, {"model": "m", "version": "2"},
        {"deployment_ids": ["a-1", "b-2"]},
        {"since": NOW - 2 * HOUR}, {"until": NOW - 90 * dt.timedelta(minutes=1), "by_device": False},
        {"since": NOW - 4 * HOUR, "until": NOW - HOUR}, {"since": NOW.replace(minute=0) - 3 * HOUR},
        {"since": NOW - dt.timedelta(minutes=15), "until": NOW - dt.timedelta(minutes=5)}, {"model": "other"},
    ]  # fmt: skip
    before = [summary(database, **one) for one in questions]
    assert before[1][0].requests == 2 * sum(number for number in range(1, 60) if number % 2 == 0)
    with database.write() as session:
        assert rollups.roll_up_windows(session, NOW - DAY) == 0  # nothing is that old
    with database.write() as session:
        patch = pytest.MonkeyPatch()
        patch.setattr(rollups, "WINDOWS", 30)
        assert 0 < rollups.roll_up_windows(session, NOW + DAY) < 11
        patch.undo()
    assert [summary(database, **one) for one in questions] == before
    roll_up(database)
    assert rows(database, TelemetryRollup) == len({(*_of(one), _hour(one)) for one in batches})
    assert [summary(database, **one) for one in questions] == before
    with database.write() as session:
        assert rollups.forget_windows(session, NOW + DAY) == 11
    assert rows(database, ModelWindowRow) == 0
    assert rows(database, TelemetryGroup) == 1
    for question, then in zip(questions, before, strict=True):
        whole = all(not isinstance(one, dt.datetime) or one.minute == 0 for one in question.values())
        assert not whole or summary(database, **question) == then
    with database.write() as session:
        assert rollups.roll_up_hours(session, NOW + DAY) > 0
    assert {one.step_s for one in _rollups(database)} == {86_400}
    assert summary(database, by_device=False) == before[1]
    store(database, *(sent("a", number, NOW - HOUR, requests=5) for number in range(100, 110)))  # late ones
    roll_up(database)
    assert requests(database) == sum(one.requests for one in before[0]) + 50
    with database.write() as session:
        assert rollups.roll_up_hours(session, NOW + DAY) == 1
    assert requests(database) == sum(one.requests for one in before[0]) + 50
    with database.write() as session:
        assert rollups.forget_days(session, NOW + DAY) > 0
    assert requests(database) == 0
    assert store(database, *batches)  # they are known for ever
    assert requests(database) == 0


def _of(one: Sent) -> tuple[str, str]:
    return one.device_id, one.batch.models[0].version


def _hour(one: Sent) -> int:
    return int(one.batch.ended_at) // 3600


def _rollups(database: Database) -> list[TelemetryRollup]:
    with database.read() as session:
        return list(session.scalars(select(TelemetryRollup)))


def test_what_is_killed_on_the_way_is_as_if_it_had_not_begun(database: Database) -> None:
    register(database, "a")
    store(database, *(sent("a", number) for number in range(1, 20)))
    before = summary(database)

    class Killed(BaseException):
        pass

    steps = ("take_names", "keep_spools", "windows_of", "rollups_of", "keep_rollups", "mark_rolled_up")
    for name in steps:
        done = getattr(keeping, name)

        def dies(*given: object, _done: object = done, **named: object) -> object:
            _done(*given, **named)  # type: ignore[operator]
            raise Killed

        patch = pytest.MonkeyPatch()
        patch.setattr(keeping, name, dies)
        with pytest.raises(Killed), database.write() as session:
            rollups.roll_up_windows(session, NOW + DAY)
        patch.undo()
        assert (rows(database, TelemetryRollup), rows(database, TelemetryBatchRow)) == (0, 19), name
        assert summary(database) == before, name
    roll_up(database)
    assert summary(database) == before


def test_the_keeper_keeps_what_the_settings_say(database: Database) -> None:
    register(database, "a")
    settings = Settings(telemetry_windows_days=1, telemetry_hours_days=2, telemetry_days_days=4, telemetry_hosts_days=3)
    ages = (0.1, 1.5, 2.5, 3.5, 5.5, 6.5)
    for number, days in enumerate(ages):
        at = NOW - days * DAY
        store(database, sent("a", number, at), at=at)
    keeper = TelemetryKeeper(database, settings)
    keeper.tick(NOW)
    assert rows(database, ModelWindowRow) == 1
    steps = [one.step_s for one in _rollups(database)]
    assert (steps.count(3600), steps.count(86_400)) == (2, 2)
    assert requests(database) == 4
    assert rows(database, HostWindowRow) == 3
    other = TelemetryKeeper(database, settings)
    other.tick(NOW + 10 * DAY)  # another server has the lease
    assert requests(database) == 4
    keeper.stop()
    other.tick(NOW + 10 * DAY)
    assert (requests(database), rows(database, HostWindowRow)) == (0, 0)
    other.stop()


def test_coarser_telemetry_is_kept_no_shorter() -> None:
    with pytest.raises(ValueError, match="SHOAL_TELEMETRY_HOURS_DAYS"):
        Settings(telemetry_windows_days=100)


def test_a_device_was_heard_of_by_its_telemetry(database: Database) -> None:
    register(database, "a")
    at = NOW + dt.timedelta(days=2)
    store(database, sent("a", 1), at=at)
    with database.read() as session:
        assert session.get_one(Device, "a").last_seen_at == at


def points(database: Database, step: str, **wanted: object) -> list[tuple[dt.datetime, int, float | None]]:
    with database.read() as session:
        found = series.series(
            session, DEFAULT_FLEET, Settings(), WindowFilter(**wanted),  # type: ignore[arg-type]
            model="m", version="1", step_s=series.read_step(step), now=NOW,
        )  # fmt: skip
    return [(one.at, one.requests, one.accuracy) for one in found.points]


def test_a_series_shows_accuracy_over_time_before_and_after_rolling_up(database: Database) -> None:
    """An odd sequence of these batches was answered wrongly."""
    for device in ("a", "b"):
        register(database, device)
    start = NOW.replace(minute=0) - 3 * HOUR
    ended = [start + minutes * dt.timedelta(minutes=1) for minutes in (0, 5, 50, 61, 125, 179)]
    for number, at in enumerate(ended):
        store(database, sent("a", number, at, requests=10), sent("b", 2 * number, at, requests=30))
    hours = [(start, 120, 110 / 120), (start + HOUR, 40, 0.75), (start + 2 * HOUR, 80, 70 / 80)]
    for _ in range(2):
        assert points(database, "1h", since=start, until=NOW) == hours
        assert [one[1] for one in points(database, "1h", since=start, until=NOW, device_id="a")] == [30, 10, 20]
        only = {"devices": Device.id == "b"}
        assert [one[1:] for one in points(database, "2h", since=start - HOUR, until=NOW, **only)][-1][1] == 1.0
        assert [one[1] for one in points(database, "5m", since=start, until=start + HOUR)] == [40, 40, 40]
        assert points(database, "10s", since=start, until=start + dt.timedelta(minutes=1)) == [(start, 40, 1.0)]
        assert points(database, "1h", since=start - 5 * HOUR, until=start) == []
        assert sum(one[1] for one in points(database, "1d")) == 240
        roll_up(database)
    with database.write() as session:
        assert rollups.forget_windows(session, NOW + DAY) == 6
    assert points(database, "1h", since=start, until=NOW) == hours


@pytest.mark.parametrize(
    ("field", "step", "wanted"),
    [
        ("step", "90m", {}), ("step", "5", {}), ("step", "1s", {}), ("step", "36h", {}), ("step", "²h", {}),
        ("step", "999999d", {}), ("step", "10s", {"since": NOW - DAY}),
        ("step", "5m", {"since": NOW - 8 * DAY, "until": NOW - 7 * DAY}),
        ("step", "1h", {"since": NOW - 91 * DAY, "until": NOW - 90 * DAY}), ("since", "1h", {"since": NOW + DAY}),
    ],
)  # fmt: skip
def test_a_series_that_can_not_be_given_says_what_would_do(
    database: Database, field: str, step: str, wanted: dict[str, object]
) -> None:
    with pytest.raises(InvalidError) as caught:
        points(database, step, **wanted)
    assert caught.value.detail.startswith(f"{field}: ")
