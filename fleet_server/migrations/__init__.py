"""The database's history, by Alembic: run at every start, under a lock where several servers share a database."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import text

from fleet_server.db import Database

_LOCK = 7_470_001  # PostgreSQL advisory lock of servers that start at once


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database at an SQLAlchemy URL to a revision."""
    database = Database(url)
    try:
        with database.write() as session:
            connection = session.connection()
            if not database.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            command.upgrade(configuration(connection), revision)
    finally:
        database.dispose()


def configuration(connection: object) -> Config:
    """Alembic's configuration for an open connection."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config
