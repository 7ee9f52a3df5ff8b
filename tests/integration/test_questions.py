"""What is asked all the time past the ORM: whether there is anything to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select, text, true

from fleet_server import outbox
from fleet_server.alerts import repository as alerts
from fleet_server.commands import repository as commands
from fleet_server.conversions import repository as conversions
from fleet_server.db import Database, question
from fleet_server.enrolment import repository as enrolment
from fleet_server.gates import repository as gates
from fleet_server.models import DeviceIdentity, OutboxMessage
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.rollouts import repository as rollouts
from fleet_server.shards import repository as shards
from fleet_server.webhooks import repository as webhooks

QUESTIONS = (
    outbox.HAS_MESSAGES, alerts.HAS_MAILS, commands.HAS_OPEN, conversions.HAS_WORK, enrolment.TO_EVICT,
    gates.HAS_RUNNING, rollouts.HAS_OPEN, shards.HAS_OPEN, webhooks.HAS_PENDING,
)  # fmt: skip


@pytest.mark.parametrize("statement", QUESTIONS)
def test_an_empty_database_has_nothing_to_do(database: Database, statement: str) -> None:
    assert not database.finds(statement)


def test_what_was_committed_is_found_and_what_was_not_is_not(database: Database) -> None:
    with database.write() as session:
        outbox.enqueue(session, fleet_id=DEFAULT_FLEET, topic="shoal/v1/default/d/a/desired", payload=b"", retain=False)
        session.add(DeviceIdentity(device_id="a", fleet_id=DEFAULT_FLEET, created_by="token", evict=False))
        session.flush()
        assert not database.finds(outbox.HAS_MESSAGES)
    assert database.finds(outbox.HAS_MESSAGES)
    assert not database.finds(question(select(OutboxMessage.id).where(OutboxMessage.topic == "it's another")))
    assert not database.finds(enrolment.TO_EVICT)
    with database.write() as session:
        session.get_one(DeviceIdentity, "a").evict = True
    assert database.finds(enrolment.TO_EVICT)
    assert database.finds(question(select(DeviceIdentity.device_id).where(DeviceIdentity.evict == true())))


def test_where_it_cannot_be_asked_there_may_be_something(database: Database, tmp_path: Path) -> None:
    assert database.finds("SELECT 1 FROM nowhere")
    assert not database.finds(outbox.HAS_MESSAGES), "and the next is answered"
    absent = Database(f"sqlite:///{tmp_path / 'none' / 'shoal.db'}")
    assert absent.finds(outbox.HAS_MESSAGES)
    absent.dispose()


def test_a_writer_keeps_nobody_from_asking(database: Database) -> None:
    with database.write() as session:
        session.execute(text("DELETE FROM outbox"))
        assert not database.finds(outbox.HAS_MESSAGES)
