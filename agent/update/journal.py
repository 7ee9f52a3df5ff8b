"""The journal: deployments and the desired revision in SQLite, written before anything is done about them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec

from agent.update.updater import Record


class Journal:
    """One file; used by the supervisor's main thread only."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("CREATE TABLE IF NOT EXISTS deployments (id TEXT PRIMARY KEY, record BLOB NOT NULL)")
        self._db.execute("CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value REAL NOT NULL)")

    def load(self) -> dict[str, Record]:
        """Every deployment that has not been forgotten."""
        rows = self._db.execute("SELECT id, record FROM deployments ORDER BY rowid").fetchall()
        return {key: msgspec.json.decode(record, type=Record) for key, record in rows}

    def save(self, records: dict[str, Record]) -> None:
        """Write these deployments, all or none; others stay."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                "INSERT INTO deployments (id, record) VALUES (?, ?) "
                "ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                [(key, msgspec.json.encode(record)) for key, record in records.items()],
            )

    def forget(self, ids: list[str]) -> None:
        """Remove deployments."""
        self._db.executemany("DELETE FROM deployments WHERE id = ?", [(key,) for key in ids])

    def number(self, name: str, default: float) -> float:
        """A kept number, such as the desired revision."""
        row = self._db.execute("SELECT value FROM numbers WHERE name = ?", (name,)).fetchone()
        return float(row[0]) if row else default

    def keep_number(self, name: str, value: float) -> None:
        """Keep a number."""
        self._db.execute(
            "INSERT INTO numbers VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value)
        )

    def close(self) -> None:
        """Close the file."""
        self._db.close()
