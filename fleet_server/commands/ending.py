"""How commands end, and who is told: the audit log, and webhooks of the fleet."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy.orm import Session

from fleet_server import audit, events
from fleet_server.domain.commands import CommandState, check_transition
from fleet_server.models import DeviceCommand


def end(
    session: Session, row: DeviceCommand, state: CommandState, code: str, detail: str, now: dt.datetime, *, by: str
) -> None:
    """A command ends; `shoal.command.finished` says so.

    Args:
        session: a writing session; the caller commits.
        row: the command.
        state: one that is an end.
        code: why it did not succeed; empty when it did.
        detail: the same for people.
        now: the time.
        by: who says so: its device, or the server.
    """
    row.state = check_transition(CommandState(row.state), state).value
    row.code, row.detail, row.finished_at = code, detail, now
    said = {"kind": row.kind, "device": row.device_id, "state": row.state, "code": code}
    audit.record(
        session, fleet_id=row.fleet_id, actor=by, action="command.finish", subject=f"command/{row.id}", detail=said
    )

    def data() -> dict[str, Any]:
        return {
            "id": row.id,
            "device_id": row.device_id,
            "kind": row.kind,
            "state": row.state,
            "code": row.code,
            "detail": row.detail,
            "result": row.result,
        }

    subject = f"command/{row.id}"
    events.emit(session, fleet_id=row.fleet_id, kind="shoal.command.finished", subject=subject, data=data)
