"""Every query over commands and their log lines."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Sequence

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.orm import Session

from agent.protocol.commands import LEVELS
from fleet_server.db import question, rows_by, scalars_by
from fleet_server.domain.commands import ENDED, OPEN, CommandState
from fleet_server.models import CommandLogLine, Device, DeviceCommand
from fleet_server.paging import PageRequest, Rows, TableList

COMMANDS = TableList(
    DeviceCommand.id,
    {"created_at": DeviceCommand.id, "device_id": DeviceCommand.device_id, "deadline_at": DeviceCommand.deadline_at},
    default="-created_at",
    time=DeviceCommand.created_at,
)
LINES = TableList(CommandLogLine.sequence, {"sequence": CommandLogLine.sequence}, default="sequence")
_OPEN = sorted(one.value for one in OPEN)
HAS_OPEN = question(select(DeviceCommand.id).where(DeviceCommand.state.in_(_OPEN)))
_ENDED = sorted(one.value for one in ENDED)


def command(session: Session, fleet_id: str, command_id: str) -> DeviceCommand | None:
    """One command of a fleet."""
    found = session.get(DeviceCommand, command_id)
    return found if found is not None and found.fleet_id == fleet_id else None


def commands_page(
    session: Session, fleet_id: str, page: PageRequest, *, device: str | None, kind: str | None, state: str | None
) -> Rows[DeviceCommand]:
    """A page of commands."""
    query = select(DeviceCommand).where(DeviceCommand.fleet_id == fleet_id)
    for column, value in (
        (DeviceCommand.device_id, device),
        (DeviceCommand.kind, kind),
        (DeviceCommand.state, state),
    ):
        if value is not None:
            query = query.where(column == value)
    return COMMANDS.scalars(session, query, page)


def open_of(session: Session, device_ids: Sequence[str]) -> Sequence[DeviceCommand]:
    """Commands of devices that are not over, the oldest first."""
    query = select(DeviceCommand).where(DeviceCommand.state.in_(_OPEN)).order_by(DeviceCommand.id).with_for_update()
    return list(scalars_by(session, query, DeviceCommand.device_id, device_ids))


def open_counts(session: Session, device_ids: Sequence[str]) -> Counter[str]:
    """How many commands of each device are not over."""
    device = DeviceCommand.device_id
    query = select(device, func.count()).where(DeviceCommand.state.in_(_OPEN)).group_by(device)
    return Counter({row[0]: row[1] for row in rows_by(session, query, device, device_ids)})


def overdue(session: Session, now: dt.datetime, grace: dt.timedelta) -> Sequence[DeviceCommand]:
    """Commands whose time is over: of those that a device has, a while ago, so that its own word comes first."""
    queued = (DeviceCommand.state == CommandState.QUEUED.value) & (DeviceCommand.deadline_at < now)
    others = DeviceCommand.state.in_(_OPEN) & (DeviceCommand.deadline_at < now - grace)
    return session.scalars(select(DeviceCommand).where(queued | others).with_for_update(skip_locked=True)).all()


def unheard(session: Session, before: dt.datetime, limit: int) -> Sequence[DeviceCommand]:
    """Commands that were sent before a time to devices that are connected, and that are not over."""
    query = (
        select(DeviceCommand)
        .join(Device, Device.id == DeviceCommand.device_id)
        .where(DeviceCommand.state.in_(_OPEN), Device.online.is_(True))
        .where(DeviceCommand.sent_at.is_(None) | (DeviceCommand.sent_at < before))
        .order_by(DeviceCommand.id)
        .limit(limit)
    )
    return session.scalars(query.with_for_update(of=DeviceCommand, skip_locked=True)).all()


def forget_before(session: Session, before: dt.datetime, limit: int) -> int:
    """Delete some of the commands that ended before a time, with their lines; how many."""
    query = select(DeviceCommand.id).where(DeviceCommand.state.in_(_ENDED), DeviceCommand.finished_at < before)
    ids = session.scalars(query.order_by(DeviceCommand.id).limit(limit)).all()
    if ids:
        session.execute(delete(CommandLogLine).where(CommandLogLine.command_id.in_(ids)))
        session.execute(delete(DeviceCommand).where(DeviceCommand.id.in_(ids)))
    return len(ids)


def _lines(command_id: str, level: str | None) -> ColumnElement[bool]:
    mine = CommandLogLine.command_id == command_id
    return mine if level is None else mine & CommandLogLine.level.in_(LEVELS[LEVELS.index(level) :])


def lines_page(session: Session, command_id: str, page: PageRequest, *, level: str | None) -> Rows[CommandLogLine]:
    """A page of a command's log."""
    return LINES.scalars(session, select(CommandLogLine).where(_lines(command_id, level)), page)


def lines_after(session: Session, command_id: str, sequence: int, limit: int) -> Sequence[CommandLogLine]:
    """Lines of a command's log after one, in order."""
    query = select(CommandLogLine).where(_lines(command_id, None), CommandLogLine.sequence > sequence)
    return session.scalars(query.order_by(CommandLogLine.sequence).limit(limit)).all()


def keep_newest_lines(session: Session, command_id: str, most: int) -> None:
    """Delete the oldest lines of a command's log, where there are more."""
    mine = _lines(command_id, None)
    query = select(CommandLogLine.sequence).where(mine).order_by(CommandLogLine.sequence.desc())
    last = session.scalar(query.offset(most).limit(1))
    if last is not None:
        session.execute(delete(CommandLogLine).where(mine, CommandLogLine.sequence <= last))
