"""Every query over the audit log."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.http import PageRequest
from fleet_server.models import AuditEvent


def events_page(session: Session, fleet_id: str, request: PageRequest) -> Sequence[AuditEvent]:
    """Events, newest first: one more than asked for, when there are more."""
    query = select(AuditEvent).where(AuditEvent.fleet_id == fleet_id).order_by(AuditEvent.id.desc())
    if request.after is not None:
        query = query.where(AuditEvent.id < request.after)
    return session.scalars(query.limit(request.limit + 1)).all()
