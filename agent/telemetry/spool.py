"""Telemetry batches on disk until the server has stored them; the oldest go when there are too many."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

from agent.protocol.codec import encode
from agent.protocol.messages import TelemetryAck, TelemetryBatch

LIMIT = 20_000


class Spool:
    """One SQLite file; used by the supervisor's main thread only."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("CREATE TABLE IF NOT EXISTS spool (id TEXT NOT NULL)")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS batches "
            "(sequence INTEGER PRIMARY KEY AUTOINCREMENT, payload BLOB, sent_at REAL NOT NULL DEFAULT 0)"
        )
        row = self._db.execute("SELECT id FROM spool").fetchone()
        self.spool_id = row[0] if row else uuid.uuid4().hex
        if row is None:
            self._db.execute("INSERT INTO spool VALUES (?)", (self.spool_id,))

    def add(self, make: Callable[[str, int], TelemetryBatch]) -> None:
        """Keep a batch made for the spool's id and its next sequence."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            sequence = self._db.execute("INSERT INTO batches (payload) VALUES (NULL)").lastrowid or 0
            payload = encode(make(self.spool_id, sequence))
            self._db.execute("UPDATE batches SET payload = ? WHERE sequence = ?", (payload, sequence))
            self._db.execute("DELETE FROM batches WHERE sequence <= ?", (sequence - LIMIT,))

    def due(self, now: float, *, resend_s: float, limit: int) -> list[tuple[int, bytes]]:
        """The oldest batches that were not sent in the last `resend_s` seconds; they count as sent now."""
        rows = self._db.execute(
            "SELECT sequence, payload FROM batches WHERE sent_at < ? ORDER BY sequence LIMIT ?", (now - resend_s, limit)
        ).fetchall()
        self._db.executemany("UPDATE batches SET sent_at = ? WHERE sequence = ?", [(now, row[0]) for row in rows])
        return [(row[0], row[1]) for row in rows]

    def acknowledge(self, ack: TelemetryAck) -> None:
        """Forget what the server has stored; an answer to another spool means nothing here."""
        if ack.spool_id == self.spool_id:
            self._db.executemany("DELETE FROM batches WHERE sequence = ?", [(number,) for number in ack.sequences])

    def close(self) -> None:
        """Close the file."""
        self._db.close()
