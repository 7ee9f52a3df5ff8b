"""Databases for integration tests: a SQLite file, and a throw-away PostgreSQL cluster where it is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet_server import migrations
from fleet_server.db import Database
from tests import softhsm, sqlite_file
from tests.databases import make_empty, postgresql, postgresql_programs


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A throw-away cluster on a free port of loopback."""
    if not postgresql_programs():
        pytest.skip("PostgreSQL is not installed")
    with postgresql(durable=False) as url:
        yield url


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[softhsm.SoftHsm]:
    """Tokens of SoftHSM, the same for a whole process: the module takes no second configuration."""
    if not softhsm.installed():
        pytest.skip("SoftHSM is not installed (apt-get install softhsm2)")
    pytest.importorskip("pkcs11")
    made = softhsm.make(tmp_path_factory.mktemp("softhsm"))
    os.environ["SOFTHSM2_CONF"] = str(made.configuration)
    yield made
    del os.environ["SOFTHSM2_CONF"]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database with every table and the default fleet, on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        sqlite_file.put(tmp_path)
        url = f"sqlite:///{tmp_path / 'shoal.db'}"
    else:
        url = request.getfixturevalue("postgresql_url")
        migrations.upgrade(url)
    database = Database(url)
    if not database.is_sqlite:
        with database.write() as session:
            make_empty(session)
    yield database
    database.dispose()
