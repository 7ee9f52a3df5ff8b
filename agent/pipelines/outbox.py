"""Results on the disk until every sink has taken them, and how far the source has come: one SQLite file a pipeline.

A result, what it is for, and the source's progress are one transaction: a process that is killed at any moment neither
loses a result nor makes one twice. When it is full the oldest go.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.database import open_database, writing
from agent.pipelines.items import Progress

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS pending (
    sink TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (sink, number)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS pending_number ON pending (number);
CREATE TABLE IF NOT EXISTS progress (key TEXT PRIMARY KEY, state TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Kept:
    """A result that waits for a sink."""

    number: int
    id: str
    body: bytes


class Outbox:
    """May be used by any thread.

    Args:
        path: of the file.
        sinks: names of those that get every result; what waits for others is forgotten.
        limit_bytes: of all results that wait.

    Attributes:
        lost: why what was there before is not; empty when all is well.
        unwritable: why nothing lasts that is kept now; empty when it does.
    """

    def __init__(self, path: Path, sinks: Sequence[str], limit_bytes: int) -> None:
        self._path, self._sinks, self._limit = path, tuple(sinks), limit_bytes
        found = open_database(path, SCHEMA, shared=True)
        self._db, self.lost, self.unwritable = found.connection, found.lost, found.unwritable
        self._lock = threading.Lock()
        self._grown = threading.Condition(self._lock)
        self._dropped = 0
        marks = ",".join("?" * len(self._sinks))
        with writing(path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(f"DELETE FROM pending WHERE sink NOT IN ({marks})", self._sinks)  # noqa: S608
            self._db.execute("DELETE FROM events WHERE number NOT IN (SELECT number FROM pending)")
        self._bytes = int(self._db.execute("SELECT COALESCE(SUM(LENGTH(body)), 0) FROM events").fetchone()[0])

    def put(self, result: tuple[str, bytes] | None, progress: Progress | None) -> None:
        """Keep a result for every sink, and how far the source has come.

        Args:
            result: id and body; None where there is nothing to be published.
            progress: None where the source has none.

        Raises:
            DatabaseError: when neither could be kept.
        """
        with self._grown:
            with writing(self._path), self._db:
                self._db.execute("BEGIN IMMEDIATE")
                freed = gone = 0
                if result is not None:
                    freed, gone = self._make_room(len(result[1]))
                    cursor = self._db.execute("INSERT INTO events (id, body) VALUES (?, ?)", result)
                    rows = [(sink, cursor.lastrowid) for sink in self._sinks]
                    self._db.executemany("INSERT INTO pending (sink, number) VALUES (?, ?)", rows)
                if progress is not None:
                    row = (progress.key, progress.state)
                    self._db.execute("INSERT OR REPLACE INTO progress (key, state) VALUES (?, ?)", row)
            self._bytes += (len(result[1]) if result else 0) - freed
            self._dropped += gone
            if result is not None:
                self._grown.notify_all()

    def due(self, sink: str, limit: int, wait_s: float) -> list[Kept]:
        """The oldest results that wait for a sink; none, when none have come in that time.

        Raises:
            DatabaseError: when they can't be read.
        """
        with self._grown:
            rows = self._due(sink, limit)
            if not rows and wait_s > 0:
                self._grown.wait(wait_s)
                rows = self._due(sink, limit)
        return rows

    def _due(self, sink: str, limit: int) -> list[Kept]:
        with writing(self._path):
            rows = self._db.execute(
                "SELECT number, id, body FROM pending JOIN events USING (number) WHERE sink = ? "
                "ORDER BY number LIMIT ?",
                (sink, limit),
            ).fetchall()
        return [Kept(*row) for row in rows]

    def confirm(self, sink: str, numbers: Sequence[int]) -> None:
        """A sink has taken results; those that all have are forgotten.

        Raises:
            DatabaseError: when that can't be kept: they are sent again.
        """
        with self._lock, writing(self._path):
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany(
                    "DELETE FROM pending WHERE sink = ? AND number = ?", [(sink, number) for number in numbers]
                )
                gone = [
                    row
                    for number in numbers
                    for row in self._db.execute(
                        "DELETE FROM events WHERE number = ? AND number NOT IN (SELECT number FROM pending) "
                        "RETURNING LENGTH(body)",
                        (number,),
                    ).fetchall()
                ]
            self._bytes -= sum(row[0] for row in gone)

    def progress(self) -> dict[str, str]:
        """How far the source has come, by key.

        Raises:
            DatabaseError: when it can't be read.
        """
        with self._lock, writing(self._path):
            return dict(self._db.execute("SELECT key, state FROM progress").fetchall())

    def forget(self, keys: Sequence[str]) -> None:
        """Progress of what is not there any more.

        Raises:
            DatabaseError: when that can't be kept.
        """
        with self._lock, writing(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM progress WHERE key = ?", [(key,) for key in keys])

    def take_dropped(self) -> int:
        """How many results went since this was asked last, before a sink had them."""
        with self._lock:
            count, self._dropped = self._dropped, 0
        return count

    def wake(self) -> None:
        """Let nobody wait any longer."""
        with self._grown:
            self._grown.notify_all()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _make_room(self, added: int) -> tuple[int, int]:
        """Drop the oldest until there is room; bytes and results that went."""
        freed = count = 0
        while self._bytes + added - freed > self._limit:
            row = self._db.execute("SELECT number, LENGTH(body) FROM events ORDER BY number LIMIT 1").fetchone()
            if row is None:
                break
            self._db.execute("DELETE FROM events WHERE number = ?", (row[0],))
            self._db.execute("DELETE FROM pending WHERE number = ?", (row[0],))
            freed, count = freed + row[1], count + 1
        return freed, count
