"""Databases of tests that are used again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from fleet_server.db import Base
from fleet_server.models import Fleet
from fleet_server.models.access import DEFAULT_FLEET


@contextmanager
def without_triggers(session: Session) -> Iterator[None]:
    """As who owns the database can: with its append-only tables open to any change."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SET LOCAL session_replication_role = replica"))
        yield
        session.execute(text("SET LOCAL session_replication_role = DEFAULT"))
        return
    triggers = session.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")).all()
    for name, _ in triggers:
        session.execute(text(f"DROP TRIGGER {name}"))
    yield
    for _, statement in triggers:
        session.execute(text(statement))


def make_empty(session: Session) -> None:
    """Nothing but the default fleet."""
    # The server's own threads go on meanwhile. Who signs holds its fleet first: so do we, or each waits for the other.
    session.execute(select(Fleet.id).with_for_update()).all()
    with without_triggers(session):
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())
    session.add(Fleet(id=DEFAULT_FLEET))
