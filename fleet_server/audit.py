"""What was done, by whom: rows that are only ever added, in the transaction of what they record."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from fleet_server.models import AuditEvent
from fleet_server.principals import Who


def record(
    session: Session, *, fleet_id: str, actor: Who, action: str, subject: str, detail: dict[str, Any] | None = None
) -> None:
    """Add an event to the present transaction.

    Args:
        session: a writing session; the caller commits.
        fleet_id: where it happened.
        actor: who did it: a principal by a request, `server`, or a device's id.
        action: what was done, such as `rollout.create`.
        subject: to what, such as `rollout/0190…`.
        detail: small JSON with what else matters.
    """
    session.add(AuditEvent(fleet_id=fleet_id, actor=str(actor), action=action, subject=subject, detail=detail or {}))
