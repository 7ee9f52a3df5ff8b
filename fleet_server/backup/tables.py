"""Every row of a database into another, table by table: the same on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Integer, Table, delete, func, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from fleet_server import models
from fleet_server.db import Base
from fleet_server.errors import InvalidError

assert models.Fleet.metadata is Base.metadata
AT_ONCE = 1000


def tables() -> Sequence[Table]:
    """Every table, those that others refer to first."""
    return Base.metadata.sorted_tables


def copy_rows(source: Connection, target: Connection) -> dict[str, int]:
    """Copy all rows into a database with the same tables, which has none; returns how many each table has.

    Within a table rows go by their keys: what refers to an earlier row of the same table finds it there.
    """
    counts = {}
    for table in tables():
        rows = source.execution_options(yield_per=AT_ONCE).execute(select(table).order_by(*table.primary_key.columns))
        counts[table.name] = 0
        for piece in rows.mappings().partitions(AT_ONCE):
            target.execute(insert(table), [dict(row) for row in piece])
            counts[table.name] += len(piece)
    if target.dialect.name == "postgresql":
        _count_on(target)
    return counts


def clear(connection: Connection) -> None:
    """Remove what migrations put into tables; those that are append-only have nothing of it."""
    rows = count_rows(connection)
    for table in reversed(tables()):
        if rows[table.name]:
            connection.execute(delete(table))


def count_rows(connection: Connection) -> dict[str, int]:
    """How many rows each table has."""
    return {one.name: int(connection.scalar(select(func.count()).select_from(one)) or 0) for one in tables()}


def revision_of(connection: Connection) -> str | None:
    """The schema's revision; None for a database that has no table of ours."""
    if not connection.dialect.has_table(connection, "alembic_version"):
        return None
    try:
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))
    except SQLAlchemyError as error:
        raise InvalidError("bad_database", f"the database does not say which version it is of: {error}") from None


def _count_on(connection: Connection) -> None:
    """Let numbers that the database gives go on after those that are there."""
    for table in tables():
        for column in table.primary_key.columns:
            if isinstance(column.type, Integer) and column.autoincrement is True:
                sequence = connection.scalar(func.pg_get_serial_sequence(table.name, column.name))
                last = connection.scalar(select(func.max(column)))
                if sequence and last:
                    connection.execute(select(func.setval(sequence, last)))
