"""The migrations make the tables that the models describe, on a real SQLite and a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, create_engine, select, text

from fleet_server import migrations
from fleet_server.db import Base, Database
from fleet_server.errors import UnavailableError
from fleet_server.models import (
    ConversionJob,
    Deployment,
    Device,
    Fleet,
    HostWindowRow,
    Model,
    Profile,
    Rollout,
    SchemaFloor,
    Variant,
    Version,
)
from fleet_server.principals import DEFAULT_FLEET
from tests.integration.test_database_rules import queue_jobs, register
from tests.integration.test_telemetry import roll_up, rows, sent, store, summary
from tests.rows import insert_one_each


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
    migrations.downgrade(database.url, "0002")
    migrations.upgrade(database.url)
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
    for direction, revision in ((migrations.downgrade, "0014"), (migrations.upgrade, "head")):
        direction(database.url, revision)
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


def test_every_step_back_and_forth_with_rows_in_every_table(database: Database) -> None:
    """To the first revision and back, one at a time; what every revision knows is there still."""
    with database.write() as session:
        insert_one_each(session.connection(), Base.metadata)
    revisions = migrations.revisions()
    for revision in reversed(revisions[:-1]):
        migrations.downgrade(database.url, revision)
    for revision in revisions[1:]:
        migrations.upgrade(database.url, revision)
    with database.read() as session:
        for model in (Fleet, Device, Profile, Model, Version, Variant, Rollout, Deployment, ConversionJob):
            assert session.query(model).count() >= 1, model.__tablename__
        context = MigrationContext.configure(session.connection(), opts={"compare_type": False})
        assert compare_metadata(context, Base.metadata) == []


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without a table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'other.db'}"
        return
    server = create_engine(request.getfixturevalue("postgresql_url"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text("CREATE DATABASE other"))
    yield server.url.set(database="other").render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.execute(text("DROP DATABASE other WITH (FORCE)"))
    server.dispose()


def test_servers_of_the_release_before_go_on_beside_a_newer_one(empty_url: str) -> None:
    """Whatever they write, without knowing of what was added, is taken by the newer tables.

    It holds for every migration after the first release with several servers, unless that says that it contracts.
    """
    revisions = migrations.revisions()
    begin = revisions.index("0029")
    migrations.upgrade(empty_url, revisions[begin])
    older = revisions[begin]
    for revision in revisions[begin + 1 :]:
        if migrations.plan(empty_url).contracts:
            break
        database = Database(empty_url)
        known = MetaData()
        known.reflect(database.engine)
        migrations.upgrade(empty_url, revision)
        with database.engine.connect() as connection:
            names = insert_one_each(connection, known)
            for table in known.sorted_tables:
                assert connection.execute(select(table)).first() is not None
            connection.rollback()
        assert len(names) > 40, f"{older} had fewer tables"
        database.dispose()


def test_an_older_program_starts_on_a_database_that_only_grew(empty_url: str, caplog: pytest.LogCaptureFixture) -> None:
    migrations.upgrade(empty_url)
    assert migrations.plan(empty_url) == migrations.Plan(migrations.head(), (), ())
    database = Database(empty_url)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9998'"))
    assert migrations.plan(empty_url).newer
    migrations.upgrade(empty_url)
    assert "is of a later release" in caplog.text
    with database.write() as session:
        session.add(SchemaFloor(id=1, revision="9997"))
    with pytest.raises(UnavailableError, match="which this release can't work with"):
        migrations.upgrade(empty_url)
    database.dispose()


def test_a_migration_that_older_servers_can_not_work_with_leaves_its_mark(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrations.upgrade(empty_url, "0029")
    scripts = migrations._scripts()
    monkeypatch.setattr(scripts[-1].module, "contracts", True, raising=False)
    monkeypatch.setattr(migrations, "_scripts", lambda: scripts)
    assert migrations.plan(empty_url).contracts == (migrations.head(),)
    migrations.upgrade(empty_url)
    database = Database(empty_url)
    with database.read() as session:
        assert [one.revision for one in session.query(SchemaFloor)] == [migrations.head()]
    database.dispose()
