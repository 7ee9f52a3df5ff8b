"""Databases of tests: a throw-away PostgreSQL cluster, and ones that are used again."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from fleet_server.db import Base
from fleet_server.models import Fleet
from fleet_server.principals import DEFAULT_FLEET
from tests.fleet import free_port, wait_until

TRIES = 5


def short_on_sqlite(fixture: str) -> pytest.MarkDecorator:
    """For a test whose subject is not the database: the short form runs it on SQLite alone, the long form on both.

    Args:
        fixture: that takes "sqlite" or "postgresql" as its parameter.
    """
    both = ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)]
    return pytest.mark.parametrize(fixture, both, indirect=True)


def postgresql_programs() -> Path | None:
    """Where the newest PostgreSQL's programs are."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return found[-1] if found else None


def _as_postgres(command: list[str]) -> list[str]:
    """PostgreSQL refuses to run as root."""
    return (
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        if os.geteuid() == 0
        else command
    )


@contextmanager
def postgresql(*, durable: bool = True) -> Iterator[str]:
    """The address of a cluster on a free port of loopback, with nothing in it.

    Args:
        durable: it waits for the disk, as it must where it is measured; what dies with the tests need not.
    """
    programs = postgresql_programs()
    assert programs is not None
    folder, port = Path(tempfile.mkdtemp(prefix="shoal-pg-")), free_port()
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    data = str(folder / "data")
    options = [] if durable else ["-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off"]
    subprocess.run(
        _as_postgres([str(programs / "initdb"), "--no-sync", "-D", data, "-A", "trust", "-U", "shoal"]),
        check=True,
        capture_output=True,
    )
    where = ["-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)]
    server = subprocess.Popen(
        _as_postgres([str(programs / "postgres"), *where, *options]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-t", "1"]
        wait_until("PostgreSQL", lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0, 60)
        yield f"postgresql+psycopg://shoal@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def without_triggers(session: Session) -> Iterator[None]:
    """As who owns the database can: with its append-only tables open to any change."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SET LOCAL session_replication_role = replica"))
        yield
        session.execute(text("SET LOCAL session_replication_role = DEFAULT"))
        return
    triggers = session.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")).all()
    for name, _ in triggers:
        session.execute(text(f"DROP TRIGGER {name}"))
    yield
    for _, statement in triggers:
        session.execute(text(statement))


def make_empty(session: Session) -> None:
    """Nothing but the default fleet."""
    # The server's own threads go on meanwhile: where one waits for what is locked here, and the other way round, the
    # database ends one of both.
    for left in reversed(range(TRIES)):
        try:
            with session.begin_nested():
                _delete_all(session)
            break
        except OperationalError:
            if not left:
                raise
    session.add(Fleet(id=DEFAULT_FLEET))


def _delete_all(session: Session) -> None:
    # Who signs holds its fleet first: so do we.
    session.execute(select(Fleet.id).with_for_update()).all()
    with without_triggers(session):
        connection = session.connection()
        for table in reversed(Base.metadata.sorted_tables):
            connection.exec_driver_sql(f'DELETE FROM "{table.name}"')
