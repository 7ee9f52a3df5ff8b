"""Databases of tests that are used again."""

from __future__ import annotations

from sqlalchemy.orm import Session

from fleet_server.db import Base
from fleet_server.models import Fleet
from fleet_server.models.access import DEFAULT_FLEET


def make_empty(session: Session) -> None:
    """Nothing but the default fleet."""
    for table in reversed(Base.metadata.sorted_tables):
        session.execute(table.delete())
    session.add(Fleet(id=DEFAULT_FLEET))
