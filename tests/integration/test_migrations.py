"""The migrations make the tables that the models describe, on a real SQLite and a real PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from fleet_server import migrations
from fleet_server.db import Base, Database
from tests.fleet import free_port, wait_until


def _as_postgres(command: list[str]) -> list[str]:
    """PostgreSQL refuses to run as root."""
    return (
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        if os.geteuid() == 0
        else command
    )


@pytest.fixture(scope="module")
def postgresql_url() -> Iterator[str]:
    """A throw-away cluster on a free port of loopback."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("PostgreSQL is not installed")
    folder, port = Path(tempfile.mkdtemp(prefix="shoal-pg-")), free_port()
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    data = str(folder / "data")
    subprocess.run(
        _as_postgres([str(found[-1] / "initdb"), "-D", data, "-A", "trust", "-U", "shoal"]),
        check=True,
        capture_output=True,
    )
    server = subprocess.Popen(
        _as_postgres([str(found[-1] / "postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ready = [str(found[-1] / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-t", "1"]
        wait_until("PostgreSQL", lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0, 60)
        yield f"postgresql+psycopg://shoal@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


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
