"""What a request asks the database, how the database goes about it, and how long that takes without anything else."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import psycopg
from fastapi import FastAPI
from sqlalchemy import event

from fleet_server.app import create_app
from fleet_server.db import Database
from fleet_server.settings import Settings

TOKEN = "the-admin-of-tests"
WHOLE = re.compile(r"^SCAN (?:TABLE )?(\w+)$|Seq Scan on (\w+)")


@dataclass(frozen=True)
class Statement:
    """One statement as its driver got it."""

    text: str
    parameters: Any


class Asked:
    """A server's API over a database, asked in this process; nothing of the server runs beside it.

    Args:
        database: with every table.
        settings: what it is told beside.
    """

    def __init__(self, database: Database, **settings: Any) -> None:
        self.database = database
        self._app: FastAPI = create_app(Settings(admin_token=TOKEN, request_rate=1e6, request_burst=10**6, **settings))
        self._app.state.database, self._app.state.admin_token = database, TOKEN
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        """End its event loop, and the connections that it waits for."""
        self.database.reads.close()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def get(self, path: str) -> Any:
        """The JSON of an answer, by ASGI: no socket and no client's work.

        Raises:
            RuntimeError: when it is another answer than 200.
        """
        status, body = self._loop.run_until_complete(self._call(f"/api/v1{path}"))
        if status != 200:
            raise RuntimeError(f"{path}: {status} {body[:500].decode()}")
        return json.loads(body)

    async def _call(self, target: str) -> tuple[int, bytes]:
        parts = urlsplit(target)
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
            "path": parts.path, "raw_path": parts.path.encode(), "query_string": parts.query.encode(), "root_path": "",
            "headers": [(b"host", b"localhost"), (b"authorization", f"Bearer {TOKEN}".encode())],
            "client": ("127.0.0.1", 1), "server": ("localhost", 80), "state": {},
        }  # fmt: skip
        status, pieces = 0, []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            pieces.append(message.get("body", b""))

        await self._app(scope, receive, send)  # type: ignore[arg-type]
        return status, b"".join(pieces)

    def statements(self, path: str) -> list[Statement]:
        """What a GET asks the database."""
        with _recorded(self.database) as found:
            self.get(path)
        return found


@contextmanager
def _recorded(database: Database) -> Iterator[list[Statement]]:
    """By SQLAlchemy, and past it by the raw driver."""
    found: list[Statement] = []
    inner, inner_text = database.driver, database.reads.text

    def keep(text: str, parameters: Any) -> None:
        if text.lstrip().upper().startswith(("SELECT", "WITH")):
            found.append(Statement(text, parameters))

    def note(_connection: Any, _cursor: Any, text: str, parameters: Any, _context: Any, _many: bool) -> None:
        keep(text, parameters)

    @contextmanager
    def driver() -> Iterator[_Noting]:
        with inner() as connection:
            yield _Noting(connection, keep)

    async def read(text: str, given: Sequence[str]) -> str | None:
        keep(text, given)
        return await inner_text(text, given)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        with patch.object(database, "driver", driver), patch.object(database.reads, "text", read):
            yield found
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


class _Noting:
    """A connection of the raw driver that says what it is asked; it can do nothing else, so that nothing passes it by.

    Args:
        connection: asked in the end.
        keep: gets each statement and its parameters.
    """

    def __init__(self, connection: Any, keep: Callable[[str, Any], None]) -> None:
        self._connection = connection
        self._keep = keep

    def execute(self, text: str, parameters: Any = ()) -> Any:
        """A cursor, as the driver's own."""
        self._keep(text, parameters)
        return self._connection.execute(text, parameters)


class Driver:
    """The raw driver: statements without SQLAlchemy, and their plans."""

    def __init__(self, database: Database) -> None:
        self._raw = database.engine.raw_connection()
        self._driver: Any = self._raw.driver_connection
        self.is_sqlite = isinstance(self._driver, sqlite3.Connection)

    def close(self) -> None:
        """Give the connection back."""
        self._raw.close()

    def run(self, statements: list[Statement]) -> float:
        """Carry statements out and fetch every row; the seconds it took."""
        started = time.perf_counter()
        for one in statements:
            self._execute(one.text, one.parameters).fetchall()
        took = time.perf_counter() - started
        self._driver.rollback()
        return took

    def plan(self, one: Statement, *, indices_only: bool = False) -> list[str]:
        """The plan of a statement, a step a line.

        Args:
            one: the statement.
            indices_only: PostgreSQL reads a table as a whole only where no index serves: so small tables tell, too.
        """
        if self.is_sqlite:
            rows = self._driver.execute(f"EXPLAIN QUERY PLAN {one.text}", one.parameters).fetchall()
            return [str(row[3]) for row in rows]
        if indices_only:
            self._driver.execute("SET LOCAL enable_seqscan = off")
        rows = self._execute(f"EXPLAIN {one.text}", one.parameters).fetchall()
        self._driver.rollback()
        return [str(row[0]) for row in rows]

    def _execute(self, text: str, parameters: Any) -> Any:
        if "$1" in text:  # asked from the event loop, with parameters as PostgreSQL itself names them
            return psycopg.RawCursor(self._driver).execute(text, parameters)
        return self._driver.execute(text, parameters)


def read_whole(plan: list[str]) -> set[str]:
    """Tables that a plan reads from one end to the other without an index."""
    found = (WHOLE.search(line.strip()) for line in plan)
    return {str(match[1] or match[2]) for match in found if match}
