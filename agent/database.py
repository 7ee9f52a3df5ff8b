"""Small SQLite files that must never keep the agent from serving: damaged ones are set aside, others stand in memory.

It knows nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.files import set_aside
from agent.protocol.errors import WireErrorCode

log = logging.getLogger("agent")
FULL = {sqlite3.SQLITE_FULL}
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_PRIMARY = 0xFF  # of an extended result code


class DatabaseError(Exception):
    """A file can't be read or written now.

    Attributes:
        code: `disk_full` or `store_error`.
        detail: a sentence for people.
        damaged: the file is not what was written: it is of no use any more.
    """

    def __init__(self, path: Path, error: sqlite3.Error) -> None:
        primary = getattr(error, "sqlite_errorcode", 0) & _PRIMARY
        self.code = WireErrorCode.DISK_FULL if primary in FULL else WireErrorCode.STORE_ERROR
        self.damaged = primary in DAMAGED
        self.detail = f"{path} can't be written: {error}; free some space or mend the disk"
        super().__init__(self.detail)


@dataclass
class Database:
    """An open database.

    Attributes:
        connection: in autocommit mode.
        lost: why nothing is there of what was there before; empty when all is well.
        unwritable: why it stands in memory alone, where nothing lasts; empty when it is on the disk.
    """

    connection: sqlite3.Connection
    lost: str = ""
    unwritable: str = ""


def open_database(
    path: Path, schema: str, *, synchronous: str = "FULL", copy: bool = True, shared: bool = False
) -> Database:
    """Open a file, whatever state it and its disk are in.

    Args:
        path: of the file.
        schema: statements that may be carried out again and again.
        synchronous: SQLite's pragma: FULL for what must survive a power cut, NORMAL where the last few may be lost.
        copy: where it can't be written, whether what can be read of it is in memory too.
        shared: whether several threads use the connection, one at a time.
    """
    try:
        return Database(_open(path, schema, synchronous, shared=shared))
    except sqlite3.Error as error:
        found = DatabaseError(path, error)
        if not found.damaged:
            return _in_memory(path, schema, found.detail, copy=copy, shared=shared)
    try:
        where = set_aside(path)
        log.error("%s is damaged; it was set aside as %s", path, where)
        fresh = _open(path, schema, synchronous, shared=shared)
        return Database(fresh, lost=f"{path} was damaged and was set aside as {where.name}")
    except (OSError, sqlite3.Error) as error:
        return _in_memory(path, schema, f"{path} is damaged and can't be replaced: {error}", copy=False, shared=shared)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """SQLite's errors as ours.

    Raises:
        DatabaseError: in place of any of SQLite's.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise DatabaseError(path, error) from error


def _open(path: Path, schema: str, synchronous: str, *, shared: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=not shared)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise _damaged(verdict)
        connection.executescript(schema)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _damaged(verdict: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(verdict)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _in_memory(path: Path, schema: str, why: str, *, copy: bool, shared: bool) -> Database:
    log.error("%s; going on in memory", why)
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=not shared)
    for option in ("mode=ro", "mode=ro&immutable=1") if copy else ():
        # Beside a -wal that can't be opened, `immutable` shows the file as it was before: better than nothing.
        with contextlib.suppress(sqlite3.Error):
            source = sqlite3.connect(f"{path.absolute().as_uri()}?{option}", uri=True)
            with contextlib.closing(source):
                source.backup(connection)
            break
    with contextlib.suppress(sqlite3.Error):
        connection.executescript(schema)
        return Database(connection, unwritable=why)
    empty = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=not shared)
    empty.executescript(schema)
    return Database(empty, unwritable=why)
