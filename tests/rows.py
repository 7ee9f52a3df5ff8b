"""A row in every table, made of nothing but what the tables say of their columns."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import JSON, Boolean, Column, Connection, DateTime, Float, Integer, LargeBinary, MetaData, insert

AT = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def insert_one_each(connection: Connection, metadata: MetaData) -> list[str]:
    """Insert them, those first that others refer to; returns the tables' names."""
    made: dict[tuple[str, str], Any] = {}
    names = []
    for table in metadata.sorted_tables:
        if table.name == "alembic_version":
            continue
        row = {}
        for column in table.columns:
            value = _value(column, made)
            if value is not None:
                row[column.name] = value
            made[table.name, column.name] = value
        connection.execute(insert(table), [row])
        names.append(table.name)
    return names


def _value(column: Column[Any], made: dict[tuple[str, str], Any]) -> Any:
    for key in column.foreign_keys:
        target = key.column
        if target.table is column.table:
            return None
        return made[target.table.name, target.name]
    kind = column.type
    meant = f"{column.name.removesuffix('_id')}s"
    if column.name.endswith("_id") and meant in column.table.metadata.tables:
        return f"{meant}-id"  # it refers to a row all the same
    if isinstance(kind, Boolean):
        return False
    if isinstance(kind, JSON):
        return None if column.nullable else {}
    if isinstance(kind, (Integer, Float)):
        return 1
    if isinstance(kind, DateTime) or "DATETIME" in type(kind).__name__.upper():
        return AT
    if isinstance(kind, LargeBinary):
        return b"\x90" if column.name == "stored" else b"\x80"  # of MessagePack: an empty array, an empty object
    return f"{column.table.name}-{column.name}"
