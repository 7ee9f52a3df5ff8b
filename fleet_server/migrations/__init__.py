"""The database's history, by Alembic: run at every start, under a lock where several servers share a database.

Servers of two releases may share it while one replaces the other, so a release's migrations only add (expand); what no
release needs any more goes in a later one (contract). A migration that older servers can't work with says so by
`contracts = True`; the last such is kept in the database, where an older server finds whether it may still start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from sqlalchemy import Connection, delete, event, insert, inspect, select, text

from fleet_server.db import Database
from fleet_server.errors import UnavailableError
from fleet_server.models import SchemaFloor

log = logging.getLogger(__name__)
_LOCK = 7_470_001  # PostgreSQL advisory lock of servers that start at once


@dataclass(frozen=True)
class Plan:
    """What an upgrade would do.

    Attributes:
        current: the database's revision; None where it has none.
        pending: revisions that are missing there, in order.
        contracts: of those, what servers of the release before can't work with: they must be stopped first.
        newer: the database is of a later release than this program.
    """

    current: str | None
    pending: tuple[str, ...]
    contracts: tuple[str, ...]
    newer: bool = False


def plan(url: str) -> Plan:
    """What `upgrade` would do to the database at an SQLAlchemy URL."""
    database = Database(url)
    try:
        with database.read() as session:
            return _plan(session.connection())
    finally:
        database.dispose()


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database at an SQLAlchemy URL to a revision; one that is of a later release is left as it is.

    Raises:
        UnavailableError: when a later release has changed it so that this one can't work with it.
    """
    with _alone(url) as connection:
        found = _plan(connection)
        if found.newer:
            _check_floor(connection, str(found.current))
            return
        if not found.pending:
            return
        command.upgrade(configuration(connection), revision)
        if revision == "head" and found.contracts:
            _set_floor(connection, found.contracts[-1])


def downgrade(url: str, revision: str) -> None:
    """Bring the database at an SQLAlchemy URL back to an earlier revision; what only later ones know is lost."""
    with _alone(url) as connection:
        command.downgrade(configuration(connection), revision)
        if inspect(connection).has_table(SchemaFloor.__tablename__):
            later = revisions()[revisions().index(revision) + 1 :] if revision in revisions() else revisions()
            connection.execute(delete(SchemaFloor).where(SchemaFloor.revision.in_(later)))


def head() -> str:
    """The revision of this program."""
    return revisions()[-1]


def revisions() -> list[str]:
    """Every revision that this program knows, the first one first."""
    return [one.revision for one in _scripts()]


def configuration(connection: object) -> Config:
    """Alembic's configuration for an open connection."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config


@contextmanager
def _alone(url: str) -> Iterator[Connection]:
    """A transaction that changes the schema while no other does.

    SQLite can't change a table but by making it anew, and would hold that against rows that refer to it: it looks at
    them once, when all is done.
    """
    database = Database(url)
    if database.is_sqlite:
        event.listen(database.engine, "connect", lambda opened, _record: opened.execute("PRAGMA foreign_keys=OFF"))
    try:
        with database.write() as session:
            connection = session.connection()
            if not database.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            yield connection
            broken = connection.execute(text("PRAGMA foreign_key_check")).first() if database.is_sqlite else None
            if broken is not None:
                raise UnavailableError("database", f"a row of {broken[0]} would refer to nothing: nothing was changed")
    finally:
        database.dispose()


def _scripts() -> list[Script]:
    return list(reversed(list(ScriptDirectory.from_config(configuration(None)).walk_revisions())))


def _plan(connection: Connection) -> Plan:
    scripts = _scripts()
    known = [one.revision for one in scripts]
    current = None
    if inspect(connection).has_table("alembic_version"):
        current = connection.scalar(text("SELECT version_num FROM alembic_version"))
    if current is not None and current not in known:
        return Plan(current, (), (), newer=True)
    pending = scripts[known.index(current) + 1 :] if current is not None else scripts
    contracts = [one.revision for one in pending if getattr(one.module, "contracts", False)]
    return Plan(current, tuple(one.revision for one in pending), tuple(contracts))


def _check_floor(connection: Connection, current: str) -> None:
    floor = None
    if inspect(connection).has_table(SchemaFloor.__tablename__):
        floor = connection.scalar(select(SchemaFloor.revision))
    if floor is not None and floor not in revisions():
        raise UnavailableError(
            "database",
            f"the database was upgraded to revision {current}, which this release can't work with: start the later "
            f"release, or bring it back first with that release (shoal admin migrate --to {head()})",
        )
    log.warning(
        "the database is of a later release (revision %s, and this one is of %s): it can be worked with",
        current,
        head(),
    )


def _set_floor(connection: Connection, revision: str) -> None:
    connection.execute(delete(SchemaFloor))
    connection.execute(insert(SchemaFloor).values(id=1, revision=revision))
