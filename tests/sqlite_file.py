"""An SQLite database to begin with: to make every table takes longer than most tests that want one."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from fleet_server import migrations
from fleet_server.db import Database
from fleet_server.models import Fleet
from fleet_server.principals import DEFAULT_FLEET


@functools.cache
def content() -> bytes:
    """Of a file with every table and the default fleet; made once in each process."""
    with tempfile.TemporaryDirectory(prefix="shoal-sqlite-") as folder:
        path = Path(folder) / "shoal.db"
        url = f"sqlite:///{path}"
        migrations.upgrade(url)
        database = Database(url)
        with database.write() as session:
            if session.get(Fleet, DEFAULT_FLEET) is None:
                session.add(Fleet(id=DEFAULT_FLEET))
        database.dispose()
        assert [one.name for one in path.parent.iterdir()] == [path.name], "all of it is in the one file"
        return path.read_bytes()


def put(folder: Path) -> None:
    """Where a server keeps its own, unless it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "shoal.db"
    if not path.exists():
        path.write_bytes(content())
