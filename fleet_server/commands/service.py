"""Rules of commands. Each function works in its caller's transaction."""

from __future__ import annotations

import datetime as dt

from sqlalchemy.orm import Session

from agent.protocol.commands import FEATURE, CommandKind
from fleet_server import audit
from fleet_server.clock import utc_now
from fleet_server.commands import repository
from fleet_server.commands.ending import end
from fleet_server.commands.schemas import (
    MOST_DEVICES,
    MOST_OPEN,
    CommandCreate,
    CommandLogLineView,
    CommandSpec,
    CommandView,
)
from fleet_server.commands.sending import send, send_cancel
from fleet_server.devices.service import chosen_devices, get_device
from fleet_server.domain.commands import ENDED, CommandState
from fleet_server.errors import ConflictError, NotFoundError
from fleet_server.models import CommandLogLine, Device, DeviceCommand
from fleet_server.principals import Who

GRACE = dt.timedelta(seconds=5)
AGAIN = dt.timedelta(seconds=30)
PIECE = 200


def command_device(
    session: Session, fleet_id: str, device_id: str, wanted: CommandSpec, *, actor: Who
) -> DeviceCommand:
    """Ask one device to do something.

    Raises:
        NotFoundError: for an unknown device.
        ConflictError: when the device can't, or may not.
    """
    device = get_device(session, fleet_id, device_id)
    why = _refusal(device, wanted.kind, repository.open_counts(session, [device_id])[device_id])
    if why is not None:
        code, detail = why
        raise ConflictError(code, f"{device_id}: {detail}")
    return _create(session, device, wanted, utc_now(), actor=actor)


def command_devices(session: Session, fleet_id: str, wanted: CommandCreate, *, actor: Who) -> list[DeviceCommand]:
    """Ask several devices; of one that can't the command is there, refused.

    Raises:
        NotFoundError: for an unknown device.
        InvalidError: when no device is meant, or too many, or the query can't be read.
    """
    found, now = chosen_devices(session, fleet_id, wanted.devices, wanted.query, most=MOST_DEVICES), utc_now()
    counts = repository.open_counts(session, [one.id for one in found])
    rows = []
    for device in found:
        why = _refusal(device, wanted.kind, counts[device.id])
        row = _create(session, device, wanted, now, actor=actor, tell=why is None)
        if why is not None:
            end(session, row, CommandState.REFUSED, *why, now, by="server")
        rows.append(row)
    return rows


def _refusal(device: Device, kind: CommandKind, waiting: int) -> tuple[str, str] | None:
    """Why a device is not asked: a code, and a sentence."""
    known: dict[str, bool] = device.facts.get("commands", {})
    if FEATURE not in device.facts.get("features", ()) or kind.value not in known:
        return "agent_too_old", f"its agent does not know the command {kind.value}: upgrade it"
    if not known[kind.value]:
        key = kind.value.replace("-", "_")
        return "command_not_allowed", f"its owner does not allow {kind.value} (commands.{key} = false on the device)"
    if waiting >= MOST_OPEN:
        return "too_many_commands", f"{waiting} commands of it are not over: wait, or cancel some"
    return None


def _create(
    session: Session, device: Device, wanted: CommandSpec, now: dt.datetime, *, actor: Who, tell: bool = True
) -> DeviceCommand:
    row = DeviceCommand(
        fleet_id=device.fleet_id,
        device_id=device.id,
        kind=wanted.kind.value,
        arguments=wanted.arguments,
        state=CommandState.QUEUED.value,
        created_by=str(actor),
        created_at=now,
        deadline_at=now + dt.timedelta(seconds=wanted.timeout_s),
    )
    session.add(row)
    session.flush()
    detail = {"kind": row.kind, "device": device.id, "arguments": row.arguments, "timeout_s": wanted.timeout_s}
    audit.record(
        session, fleet_id=device.fleet_id, actor=actor, action="command.create", subject=f"command/{row.id}",
        detail=detail,
    )  # fmt: skip
    if tell and device.online:
        send(session, row, now)
    return row


def get_command(session: Session, fleet_id: str, command_id: str) -> DeviceCommand:
    """One command.

    Raises:
        NotFoundError: when it is not there.
    """
    row = repository.command(session, fleet_id, command_id)
    if row is None:
        raise NotFoundError("command", command_id, remedy="list them with `shoal command list`")
    return row


def cancel(session: Session, row: DeviceCommand, *, actor: Who) -> None:
    """End a command. What its device has done of it stays; a restart that has begun goes on.

    Raises:
        ConflictError: when it is over.
    """
    if CommandState(row.state) in ENDED:
        raise ConflictError("command_over", f"command {row.id} is {row.state}: there is nothing to cancel")
    told = row.state != CommandState.QUEUED.value
    end(session, row, CommandState.CANCELLED, "cancelled", "it was cancelled", utc_now(), by="server")
    if told:
        send_cancel(session, row)
    audit.record(session, fleet_id=row.fleet_id, actor=actor, action="command.cancel", subject=f"command/{row.id}")


def expire(session: Session, now: dt.datetime) -> int:
    """End commands whose time is over; how many."""
    found = repository.overdue(session, now, GRACE)
    for row in found:
        why = {
            CommandState.QUEUED: "the device did not come online in time: send another, with more time (timeout_s)",
            CommandState.SENT: "the device did not answer in time: is it online, and does its broker let it listen?",
            CommandState.RUNNING: "the device began and did not say how it ended: see `shoal device show`",
        }[CommandState(row.state)]
        told = row.state != CommandState.QUEUED.value
        end(session, row, CommandState.TIMED_OUT, "timeout", why, now, by="server")
        if told:
            send_cancel(session, row)
    return len(found)


def send_again(session: Session, now: dt.datetime) -> int:
    """Tell devices again of what nothing was heard of for a while, by whatever it was lost; how many commands."""
    found = repository.unheard(session, now - AGAIN, PIECE)
    for row in found:
        send(session, row, now)
        row.sent_at = now  # one whose time is nearly over is not looked at again
    return len(found)


def command_view(row: DeviceCommand) -> CommandView:
    """The HTTP shape of a command."""
    return CommandView.model_validate(row)


def line_view(row: CommandLogLine) -> CommandLogLineView:
    """The HTTP shape of a line."""
    return CommandLogLineView.model_validate(row)
