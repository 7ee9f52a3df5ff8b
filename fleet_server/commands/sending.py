"""What devices are told of commands: rows of the outbox, in the transaction of the change.

A command is sent when it is made and its device is connected, whenever its device connects, and again while nothing
is heard of it. Devices carry an id out once, however often it comes.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.codec import encode
from agent.protocol.commands import Command, CommandArguments
from agent.protocol.limits import LIMITS
from agent.protocol.topics import DeviceTopic, device_topic
from fleet_server import outbox
from fleet_server.commands import repository
from fleet_server.domain.commands import CommandState, check_transition
from fleet_server.models import DeviceCommand

LEAST_S = 0.1


def send(session: Session, row: DeviceCommand, now: dt.datetime) -> None:
    """Tell its device of a command that is not over, unless its time is."""
    left = (row.deadline_at - now).total_seconds()
    if left <= 0:
        return
    _enqueue(session, row, left, cancel=False)
    row.sent_at = now
    if row.state == CommandState.QUEUED.value:
        row.state = check_transition(CommandState.QUEUED, CommandState.SENT).value


def send_open(session: Session, device_ids: Sequence[str], now: dt.datetime) -> None:
    """Devices have connected: tell them of all that is not over."""
    for row in repository.open_of(session, device_ids):
        send(session, row, now)


def send_cancel(session: Session, row: DeviceCommand) -> None:
    """Tell its device to leave a command off."""
    _enqueue(session, row, LEAST_S, cancel=True)


def _enqueue(session: Session, row: DeviceCommand, left_s: float, *, cancel: bool) -> None:
    command = Command(
        command_id=row.id,
        kind=row.kind,
        timeout_s=min(max(left_s, LEAST_S), LIMITS.command_s),
        expires_at=row.deadline_at.timestamp(),
        arguments=msgspec.convert(row.arguments, CommandArguments),
        cancel=cancel,
    )
    outbox.enqueue(
        session,
        fleet_id=row.fleet_id,
        topic=device_topic(row.device_id, DeviceTopic.COMMAND),
        payload=encode(command),
        retain=False,
    )
