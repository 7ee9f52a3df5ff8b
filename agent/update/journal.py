"""The journal: deployments, trials, commands, the desired revision; in SQLite, written before anything is done of it.

What can't be read of it is left out, and said: `agent.update.lastgood` knows what to serve meanwhile, and the server
the rest.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from agent.database import open_database, writing
from agent.update.updater import Record

log = logging.getLogger("agent")
SCHEMA = """
CREATE TABLE IF NOT EXISTS deployments (id TEXT PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS trials (id TEXT PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS commands (id TEXT PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value REAL NOT NULL);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""


class Journal:
    """One file; used by the supervisor's main thread only.

    Every method that writes raises `agent.database.DatabaseError` when it can't.

    Attributes:
        lost: why something is not there that was there before; empty when all is well.
        unwritable: why nothing lasts that is written now; empty when it does.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        found = open_database(path, SCHEMA)
        self._db, self.lost, self.unwritable = found.connection, found.lost, found.unwritable

    def load(self) -> dict[str, Record]:
        """Every deployment that has not been forgotten; those that make no sense are left out, and `lost` says so."""
        records = {}
        with writing(self._path):
            rows = self._db.execute("SELECT id, record FROM deployments ORDER BY rowid").fetchall()
        for key, record in rows:
            try:
                records[key] = msgspec.json.decode(record, type=Record)
            except (msgspec.MsgspecError, UnicodeDecodeError, TypeError) as error:
                self.lost = f"{self._path} holds a deployment that can't be read ({key}): {error}"
                log.error(self.lost)  # noqa: TRY400
        return records

    def save(self, records: dict[str, Record]) -> None:
        """Write these deployments, all or none; others stay."""
        self._save("deployments", {key: msgspec.json.encode(record) for key, record in records.items()})

    def forget(self, ids: list[str]) -> None:
        """Remove deployments."""
        self._forget("deployments", ids)

    def trials(self) -> dict[str, bytes]:
        """Every trial that has not been forgotten, as it was saved: what a record is, `agent.trial` knows."""
        with writing(self._path):
            return dict(self._db.execute("SELECT id, record FROM trials ORDER BY rowid").fetchall())

    def save_trials(self, records: dict[str, bytes]) -> None:
        """Write these trials, all or none; others stay."""
        self._save("trials", records)

    def forget_trials(self, ids: list[str]) -> None:
        """Remove trials."""
        self._forget("trials", ids)

    def commands(self) -> dict[str, bytes]:
        """Every command that has not been forgotten, as it was saved: what a record is, `agent.commands` knows."""
        with writing(self._path):
            return dict(self._db.execute("SELECT id, record FROM commands ORDER BY rowid").fetchall())

    def save_commands(self, records: dict[str, bytes]) -> None:
        """Write these commands, all or none; others stay."""
        self._save("commands", records)

    def forget_commands(self, ids: list[str]) -> None:
        """Remove commands."""
        self._forget("commands", ids)

    def number(self, name: str, default: float) -> float:
        """A kept number, such as the desired revision."""
        with writing(self._path):
            row = self._db.execute("SELECT value FROM numbers WHERE name = ?", (name,)).fetchone()
        return float(row[0]) if row else default

    def keep_number(self, name: str, value: float) -> None:
        """Keep a number."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO numbers VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (name, value),
            )

    def note(self, name: str) -> bytes:
        """Something small that was kept; empty when it was not."""
        with writing(self._path):
            row = self._db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return bytes(row[0]) if row else b""

    def keep_note(self, name: str, value: bytes) -> None:
        """Keep something small."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO notes VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
            )

    def renew(self) -> bool:
        """Try again to have a file that lasts.

        Returns:
            Whether it holds what was written before: false after damage, when all is to be written again.
        """
        again = open_database(self._path, SCHEMA)
        if not self.unwritable:
            self._db.close()
            self._db, self.lost, self.unwritable = again.connection, again.lost, again.unwritable
            return False
        if again.unwritable:
            again.connection.close()
            return True
        try:
            self._db.backup(again.connection)
        except sqlite3.Error:
            again.connection.close()
            return True
        self._db.close()
        self._db, self.unwritable = again.connection, ""
        return True

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _save(self, table: Literal["deployments", "trials", "commands"], rows: dict[str, bytes]) -> None:
        with self._transaction():
            self._db.executemany(
                f"INSERT INTO {table} (id, record) VALUES (?, ?) "  # noqa: S608 (one of three words)
                "ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                list(rows.items()),
            )

    def _forget(self, table: Literal["deployments", "trials", "commands"], ids: list[str]) -> None:
        if ids:
            with self._transaction():
                self._db.executemany(f"DELETE FROM {table} WHERE id = ?", [(key,) for key in ids])  # noqa: S608 (as above)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with writing(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield
