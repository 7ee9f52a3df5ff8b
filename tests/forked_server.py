"""What a forked server has in common with others: everything that it imports."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvicorn  # noqa: F401 (so that nobody forked from here need import it)

import fleet_server.app
import fleet_server.trust.https  # noqa: F401
from fleet_server.cli import server_main
from tests import sqlite_file

sqlite_file.content()  # likewise


def serve(environment: dict[str, str], log: str) -> None:
    """Be `shoal-server`, with these variables and this file for what it says; its tables are there already."""
    if "SHOAL_DATABASE_URL" not in environment:
        sqlite_file.put(Path(environment["SHOAL_STATE_DIR"]))
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["shoal-server"]
    server_main.main()
