"""The journal: deployments, trials and the desired revision in SQLite, written before anything is done about them."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Literal

import msgspec

from agent.update.updater import Record


class Journal:
    """One file; used by the supervisor's main thread only."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("CREATE TABLE IF NOT EXISTS deployments (id TEXT PRIMARY KEY, record BLOB NOT NULL)")
        self._db.execute("CREATE TABLE IF NOT EXISTS trials (id TEXT PRIMARY KEY, record BLOB NOT NULL)")
        self._db.execute("CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value REAL NOT NULL)")

    def load(self) -> dict[str, Record]:
        """Every deployment that has not been forgotten."""
        rows = self._db.execute("SELECT id, record FROM deployments ORDER BY rowid").fetchall()
        return {key: msgspec.json.decode(record, type=Record) for key, record in rows}

    def save(self, records: dict[str, Record]) -> None:
        """Write these deployments, all or none; others stay."""
        self._save("deployments", {key: msgspec.json.encode(record) for key, record in records.items()})

    def forget(self, ids: list[str]) -> None:
        """Remove deployments."""
        self._db.executemany("DELETE FROM deployments WHERE id = ?", [(key,) for key in ids])

    def trials(self) -> dict[str, bytes]:
        """Every trial that has not been forgotten, as it was saved: what a record is, `agent.trial` knows."""
        return dict(self._db.execute("SELECT id, record FROM trials ORDER BY rowid").fetchall())

    def save_trials(self, records: dict[str, bytes]) -> None:
        """Write these trials, all or none; others stay."""
        self._save("trials", records)

    def forget_trials(self, ids: list[str]) -> None:
        """Remove trials."""
        self._db.executemany("DELETE FROM trials WHERE id = ?", [(key,) for key in ids])

    def _save(self, table: Literal["deployments", "trials"], rows: dict[str, bytes]) -> None:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                f"INSERT INTO {table} (id, record) VALUES (?, ?) "  # noqa: S608 (one of two words)
                "ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                list(rows.items()),
            )

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
