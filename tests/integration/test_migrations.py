"""The migrations make the tables that the models describe, on a real SQLite and a real PostgreSQL."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from fleet_server import migrations
from fleet_server.db import Base, Database
from fleet_server.models import ConversionJob, HostWindowRow, Variant
from fleet_server.principals import DEFAULT_FLEET
from tests.integration.test_database_rules import queue_jobs, register
from tests.integration.test_telemetry import roll_up, rows, sent, store, summary


def check(url: str) -> None:
    migrations.upgrade(url)
    migrations.upgrade(url)  # a second server that starts finds everything done
    database = Database(url)
    try:
        with database.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": False})
            assert compare_metadata(context, Base.metadata) == []
    finally:
        database.dispose()


def test_sqlite(tmp_path: Path) -> None:
    check(f"sqlite:///{tmp_path / 'shoal.db'}")


def test_postgresql(postgresql_url: str) -> None:
    check(postgresql_url)


def test_jobs_live_through_the_way_back_and_forth(database: Database) -> None:
    queue_jobs(database, 1)
    with database.write() as session:
        session.query(ConversionJob).one().attempts = 2
    for direction, revision in ((command.downgrade, "0002"), (command.upgrade, "head")):
        with database.write() as session:
            direction(migrations.configuration(session.connection()), revision)
    with database.read() as session:
        job = session.query(ConversionJob).one()
        assert (job.attempts, job.lost, job.retry_at, job.fleet_id) == (2, 0, None, DEFAULT_FLEET)
        assert session.get_one(Variant, job.variant_id).state == "queued"


def test_telemetry_lives_through_the_way_back_and_forth(database: Database) -> None:
    """Windows, and that a batch was stored, whether its name is a row or in the row of its spool."""
    register(database, "a")
    batches = [sent("a", number) for number in (1, 2, 3, 7)]
    for one in batches[:2]:
        store(database, one)
    roll_up(database)
    store(database, *batches[2:])
    before = summary(database)
    for direction, revision in ((command.downgrade, "0014"), (command.upgrade, "head")):
        with database.write() as session:
            direction(migrations.configuration(session.connection()), revision)
        if revision == "0014":
            with database.read() as session:
                names = "SELECT sequence, received_at FROM telemetry_batches ORDER BY sequence"
                assert [row[0] for row in session.execute(text(names))] == [1, 2, 3, 7]
                assert session.scalar(text("SELECT count(*) FROM model_windows WHERE model = 'm'")) == 4
    assert summary(database) == before
    assert rows(database, HostWindowRow) == 4
    assert store(database, *batches) == batches
    roll_up(database)
    assert summary(database) == before
