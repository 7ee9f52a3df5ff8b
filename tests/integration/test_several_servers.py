"""What several servers on one database do: each device is one's, messages are sent once, leases outlive a restart."""

from __future__ import annotations

import datetime as dt
import threading
from pathlib import Path

import pytest
from sqlalchemy import update

from agent.protocol.topics import SHARDS, DeviceTopic, device_topic, shard_of
from fleet_server import leases, outbox
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.errors import UnavailableError
from fleet_server.gateway.device_shards import DeviceShards
from fleet_server.leases import DatabaseLease
from fleet_server.models import Device, Lease, OutboxMessage, Server
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rollouts import desired
from fleet_server.rollouts.reminder import tell_again
from fleet_server.seat import Seat
from fleet_server.servers import Common, Membership
from fleet_server.settings import Settings
from tests.integration.test_database_rules import register

LONG = dt.timedelta(minutes=1)


def member(database: Database, name: str, common: Common | None = None) -> DeviceShards:
    membership = Membership(database, name, common)
    membership.join()
    return DeviceShards(database, membership)


def lease_of(database: Database, owner: str) -> bool:
    """Whether a server of this name has the lease of an engine, or takes it."""
    own = Database(database.url, owner=owner)
    try:
        return DatabaseLease(own, "engine", 60).hold()
    finally:
        own.dispose()


def dies(database: Database, name: str) -> None:
    with database.write() as session:
        session.execute(update(Server).where(Server.name == name).values(until=utc_now() - LONG))


def test_a_lease_is_renewed_in_time_and_not_each_time(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [utc_now()]
    monkeypatch.setattr(leases, "utc_now", lambda: now[0])
    monkeypatch.setattr(database, "owner", "a")
    ours = DatabaseLease(database, "engine", 10)
    monkeypatch.setattr(database, "owner", "b")
    others = DatabaseLease(database, "engine", 10)

    def until() -> dt.datetime:
        with database.read() as session:
            return session.get_one(Lease, "engine").until

    begun = now[0]
    renewals = set()
    for second in range(30):
        now[0] = begun + dt.timedelta(seconds=second)
        assert ours.hold()
        assert until() - now[0] >= dt.timedelta(seconds=7.5), "more than three quarters, whenever it is asked for"
        renewals.add(until())
        assert not others.hold()
    assert 8 <= len(renewals) <= 15
    now[0] = until()
    assert others.hold(), "of who asks no more it is taken"
    assert not ours.hold()
    others.give_back()
    assert ours.hold()
    now[0] -= dt.timedelta(hours=1)  # the clock was set back: what was written is too far off to be believed
    assert ours.hold()
    assert until() == now[0] + dt.timedelta(seconds=10)


def test_two_servers_share_and_hand_over_without_a_gap(database: Database) -> None:
    first = member(database, "a")
    assert first.step() == frozenset()
    assert first.alone
    assert len(first.sure) == SHARDS
    first.confirm()
    second = member(database, "b")
    second.step()
    assert second.held == frozenset(), "everything is taken"
    first.step()
    assert (len(first.held), first.alone) == (SHARDS // 2, False)
    assert len(first.heard) == SHARDS, "until another hears them"
    second.step()
    assert first.held | second.held == frozenset(range(SHARDS))
    first.step()
    assert len(first.heard) == SHARDS, "taken is not heard"
    second.confirm()
    first.step()
    assert first.heard == first.held
    dies(database, "b")
    orphaned = first.step()
    assert orphaned == second.held
    assert (len(first.held), first.alone) == (SHARDS, True)


def test_a_server_that_leaves_is_followed_at_once(database: Database) -> None:
    first, second = member(database, "a"), member(database, "b")
    for one in (first, second, first, second):
        one.step()
        one.confirm()
    first.leave()
    assert first.given, "it hears them yet"
    assert not first.alone
    assert second.step() == frozenset(), "nothing is lost that was given"
    second.confirm()
    first.follow()
    assert first.heard == frozenset()
    second.leave()
    second.follow()
    assert second.alone


def test_a_server_that_starts_again_has_its_number_its_devices_and_its_leases(database: Database) -> None:
    first = member(database, "a")
    first.step()
    assert lease_of(database, "a")
    beside = Membership(database, "b")
    beside.join()
    assert beside.number == 2
    assert not lease_of(database, "b")
    again = Membership(database, "a")
    again.join()
    assert again.number == 1
    assert lease_of(database, "a")
    shards = DeviceShards(database, again)
    assert shards.step() == frozenset()
    assert len(shards.held) >= SHARDS // 2
    dies(database, "a")
    third = Membership(database, "c")
    third.join()
    assert third.number == 1, "with the session that the dead one left at the broker"


@pytest.mark.parametrize(
    ("common", "said"),
    [
        (Common(ca="other", artifacts="s3://x"), "another CA"),
        (Common(ca="one", artifacts="s3://y"), "other artifacts"),
        (Common(ca="one", artifacts="s3://x", broker=False), "SHOAL_BROKER_URL"),
    ],
)
def test_servers_that_do_not_fit_together_do_not_start(database: Database, common: Common, said: str) -> None:
    member(database, "a", Common(ca="one", artifacts="s3://x"))
    member(database, "b", Common(ca="one", artifacts="s3://x"))
    with pytest.raises(UnavailableError, match=said):
        Membership(database, "c", common).join()


def test_names_are_held_by_a_process_and_had_again(tmp_path: Path) -> None:
    first, second = Seat(tmp_path), Seat(tmp_path)
    assert first.name != second.name
    first.close()
    assert Seat(tmp_path).name == first.name


def test_each_message_is_one_servers_to_send(database: Database) -> None:
    topics = [device_topic(f"dev-{number}", DeviceTopic.COMMAND) for number in range(40)]
    with database.write() as session:
        for topic in topics:
            outbox.enqueue(session, fleet_id=DEFAULT_FLEET, topic=topic, payload=b"x", retain=False)
        retained = device_topic("dev-1", DeviceTopic.DESIRED)
        outbox.enqueue(session, fleet_id=DEFAULT_FLEET, topic=retained, payload=b"y", retain=True)
        outbox.enqueue(session, fleet_id=DEFAULT_FLEET, topic="shoal/v1/alerts/f", payload=b"z", retain=False)
    halves = range(SHARDS // 2), range(SHARDS // 2, SHARDS)
    with database.read() as session:
        both = [[one.topic for one in outbox.pending(session, limit=100, shards=half)] for half in halves]
        assert len(outbox.pending(session, limit=100, shards=range(SHARDS))) == 42
    assert all(both)
    assert sorted(both[0] + both[1]) == sorted([*topics, retained, "shoal/v1/alerts/f"])
    for half, found in zip(halves, both, strict=True):
        assert {shard_of(one.split("/")[4]) for one in found if "/d/" in one} <= set(half)


def test_an_older_servers_message_is_sent(database: Database) -> None:
    """It writes no shard: the database does."""
    with database.write() as session:
        columns = {"id": "1", "fleet_id": DEFAULT_FLEET, "topic": "t", "payload": b"", "retain": False}
        session.execute(OutboxMessage.__table__.insert().values(created_at=utc_now(), **columns))
    with database.read() as session:
        assert [one.topic for one in outbox.pending(session, limit=1, shards=range(3))] == ["t"]


def test_two_servers_that_tell_a_device_something_say_different_revisions(database: Database) -> None:
    register(database, "a")
    settings, both, errors = Settings(), threading.Barrier(2), []

    def tell() -> None:
        try:
            for _ in range(5):
                with database.write() as session:
                    device = session.get_one(Device, "a")  # each has read it before it says something new
                    if not database.is_sqlite:
                        both.wait(10)
                    desired.queue_desired(session, settings, device)
        except BaseException as error:
            errors.append(error)
            both.abort()

    threads = [threading.Thread(target=tell) for _ in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not errors
    with database.read() as session:
        assert session.get_one(Device, "a").desired_revision == 10


def test_devices_of_a_server_that_ended_are_asked_again(database: Database) -> None:
    register(database, "a")
    register(database, "b")
    with database.write() as session:
        for device in session.query(Device):
            device.online, device.desired_revision = True, 4
        session.query(Device).filter_by(id="b").one().reported_revision = 4
    shards = range(SHARDS)
    assert tell_again(database, Settings(), [one for one in shards if one != shard_of("a")]) == 0
    assert tell_again(database, Settings(), shards) == 1
    with database.read() as session:
        (message,) = outbox.pending(session, limit=10)
        assert message.topic == device_topic("a", DeviceTopic.DESIRED)
        assert session.get_one(Device, "a").desired_revision == 4
