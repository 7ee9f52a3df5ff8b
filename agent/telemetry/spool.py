"""Telemetry batches on disk until the server has stored them; the oldest go when there are too many.

A spool's id and a sequence name a batch for ever: the server stores each name once. So every start has an id of its
own, or a batch that a power cut took away would give its name, which the server may have seen, to another.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

from agent.database import open_database, writing
from agent.protocol.codec import encode
from agent.protocol.messages import TelemetryAck, TelemetryBatch
from agent.telemetry.pace import SendPace

LIMIT = 20_000
LIMIT_BYTES = 64 << 20
LIMIT_IN_MEMORY = 500
SCHEMA = """
CREATE TABLE IF NOT EXISTS kept (
    number INTEGER PRIMARY KEY AUTOINCREMENT, spool TEXT NOT NULL, sequence INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS kept_name ON kept (spool, sequence);
"""


class Spool:
    """One SQLite file; used by the supervisor's main thread only.

    Args:
        path: of the file.
        pace: how fast batches are sent.

    Attributes:
        pace: how fast batches are sent.
        spool_id: of the batches that are made from now on.
        dropped: how many batches were thrown away, or could not be kept, since the start.
        lost: why something is not there that was there before; empty when all is well.
        unwritable: why nothing lasts that is kept now; empty when it does.
    """

    def __init__(self, path: Path, pace: SendPace | None = None) -> None:
        self._path = path
        found = open_database(path, SCHEMA, synchronous="NORMAL", copy=False)
        self._db, self.lost, self.unwritable = found.connection, found.lost, found.unwritable
        self.spool_id = uuid.uuid4().hex
        self.pace = pace or SendPace()
        self.dropped = 0
        self._sequence = 0
        self._sent: dict[int, float] = {}  # batch numbers, and when they were sent; after a restart all are sent again
        self._bytes = int(self._db.execute("SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM kept").fetchone()[0])

    def add(self, make: Callable[[str, int], TelemetryBatch]) -> None:
        """Keep a batch made for the spool's id and its next sequence.

        Raises:
            DatabaseError: when it can't be kept; it counts as dropped.
        """
        self._sequence += 1
        payload = encode(make(self.spool_id, self._sequence))
        try:
            with writing(self._path), self._db:
                self._db.execute("BEGIN IMMEDIATE")
                values = (self.spool_id, self._sequence, payload)
                self._db.execute("INSERT INTO kept (spool, sequence, payload) VALUES (?, ?, ?)", values)
                self._bytes += len(payload) - self._make_room(len(payload))
        except Exception:
            self.dropped += 1
            raise

    def due(self, now: float) -> list[tuple[int, bytes]]:
        """The oldest batches that are not on their way, as many as the pace allows; from now on they are.

        Args:
            now: of a clock that is never set.
        """
        if any(now - at >= self.pace.resend_s for at in self._sent.values()):
            self.pace.late()
            self._sent.clear()
        marks = ",".join("?" * len(self._sent))
        with writing(self._path):
            rows = self._db.execute(
                f"SELECT number, payload FROM kept WHERE number NOT IN ({marks}) ORDER BY number LIMIT ?",  # noqa: S608
                (*self._sent, max(0, self.pace.limit - len(self._sent))),
            ).fetchall()
        self._sent |= {row[0]: now for row in rows}
        return [(row[0], row[1]) for row in rows]

    def acknowledge(self, ack: TelemetryAck) -> None:
        """Forget what the server has stored; an answer to another spool means nothing here.

        Raises:
            DatabaseError: when it can't be forgotten: it is sent again.
        """
        names = [(ack.spool_id, number) for number in ack.sequences]
        self.pace.stored()
        with writing(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            for name in names:
                row = self._db.execute(
                    "DELETE FROM kept WHERE spool = ? AND sequence = ? RETURNING number, LENGTH(payload)", name
                ).fetchone()
                if row is not None:
                    self._sent.pop(row[0], None)
                    self._bytes -= row[1]

    @property
    def count(self) -> int:
        """How many batches are kept."""
        return int(self._db.execute("SELECT COUNT(*) FROM kept").fetchone()[0])

    @property
    def size(self) -> int:
        """What they take, in bytes."""
        return self._bytes

    def renew(self) -> None:
        """Try again to have a file that lasts, with what was kept in memory meanwhile."""
        again = open_database(self._path, SCHEMA, synchronous="NORMAL", copy=False)
        if again.unwritable and self.unwritable:
            again.connection.close()
            return
        rows = self._db.execute("SELECT spool, sequence, payload FROM kept").fetchall() if self.unwritable else []
        try:
            with again.connection as target:
                target.execute("BEGIN IMMEDIATE")
                target.executemany("INSERT INTO kept (spool, sequence, payload) VALUES (?, ?, ?)", rows)
        except sqlite3.Error:
            again.connection.close()
            return
        self._db.close()
        self._db, self.lost, self.unwritable = again.connection, again.lost, again.unwritable
        self._sent.clear()
        self._bytes = int(self._db.execute("SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM kept").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _make_room(self, added: int) -> int:
        """Drop the oldest where there are too many; the bytes that went."""
        newest, oldest = self._db.execute("SELECT MAX(number), MIN(number) FROM kept").fetchone()
        limit = LIMIT_IN_MEMORY if self.unwritable else LIMIT
        last = newest - limit
        freed = 0
        while self._bytes + added - freed > LIMIT_BYTES and oldest < newest:
            row = self._db.execute("SELECT LENGTH(payload) FROM kept WHERE number = ?", (oldest,)).fetchone()
            freed += row[0] if row else 0
            oldest += 1
        gone = self._db.execute(
            "DELETE FROM kept WHERE number <= ? RETURNING LENGTH(payload)", (max(last, oldest - 1),)
        ).fetchall()
        self.dropped += len(gone)
        return sum(row[0] for row in gone)
