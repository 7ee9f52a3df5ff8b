"""Many rows at once, by what each database is fastest at: COPY on PostgreSQL, prepared statements on SQLite.

Both work in the session's transaction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import psycopg
from psycopg import sql
from sqlalchemy import Table, text
from sqlalchemy.orm import Session

from fleet_server.db import Base, UtcDateTime

LONG_TIME = len("2026-01-31 12:00:00.000000")


class BatchName(NamedTuple):
    """What names a batch for ever."""

    device_id: str
    spool_id: str
    sequence: int


class NamedBatch(NamedTuple):
    """A row of `telemetry_batches`."""

    device_id: str
    spool_id: str
    sequence: int
    fleet_id: str
    group_id: int


_POSTGRESQL = text("""
    INSERT INTO telemetry_batches (device_id, spool_id, sequence, fleet_id, group_id)
    SELECT * FROM unnest(CAST(:device_id AS text[]), CAST(:spool_id AS text[]), CAST(:sequence AS bigint[]),
                         CAST(:fleet_id AS text[]), CAST(:group_id AS bigint[]))
    ON CONFLICT DO NOTHING RETURNING device_id, spool_id, sequence""")
_SQLITE = text("""
    INSERT INTO telemetry_batches (device_id, spool_id, sequence, fleet_id, group_id)
    SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4 FROM json_each(:rows) WHERE true
    ON CONFLICT DO NOTHING RETURNING device_id, spool_id, sequence""")


def insert_names(session: Session, rows: Sequence[NamedBatch]) -> set[BatchName]:
    """Insert the names that are not there yet; returns these.

    Waits for a transaction of another server that inserts one of the same names, and learns how it ended. The rows are
    inserted in order, so that two servers never wait for each other.
    """
    ordered = sorted(rows)
    if _is_postgresql(session):
        columns = zip(*ordered, strict=True)
        found = session.execute(
            _POSTGRESQL, {name: list(one) for name, one in zip(NamedBatch._fields, columns, strict=True)}
        )
    else:
        found = session.execute(_SQLITE, {"rows": json.dumps(ordered)})
    return {BatchName(*row) for row in found}


def insert_rows(session: Session, table: type[Base], columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows, of each the values of `columns` in order; times in UTC. Other columns have the table's defaults."""
    if not rows:
        return
    of = cast(Table, table.__table__)
    if _is_postgresql(session):
        _copy(session, of.name, columns, rows)
        return
    statement = f"INSERT INTO {of.name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608 (our own names)
    times = [number for number, name in enumerate(columns) if isinstance(of.columns[name].type, UtcDateTime)]
    session.connection().exec_driver_sql(statement, [_with_texts(row, times) for row in rows])


def _with_texts(row: tuple[Any, ...], times: Sequence[int]) -> tuple[Any, ...]:
    """A row with its times as SQLAlchemy writes them in SQLite."""
    plain = list(row)
    for number in times:
        plain[number] = plain[number].isoformat(" ", "microseconds")[:LONG_TIME]
    return tuple(plain)


def _copy(session: Session, table: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, psycopg.Connection)
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def _is_postgresql(session: Session) -> bool:
    return session.get_bind().dialect.name == "postgresql"
