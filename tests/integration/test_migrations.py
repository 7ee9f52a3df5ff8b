"""The migrations make the tables that the models describe, on a real SQLite and a real PostgreSQL."""

from __future__ import annotations

from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from fleet_server import migrations
from fleet_server.db import Base, Database


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
