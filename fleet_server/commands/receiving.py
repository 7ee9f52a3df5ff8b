"""What devices say of their commands, and the lines of their logs. Each works in its caller's transaction."""

from __future__ import annotations

import datetime as dt

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.commands import CommandAnswer, CommandKind, CommandPhase, plain
from fleet_server.commands import repository
from fleet_server.commands.ending import end
from fleet_server.commands.schemas import MOST_LINES
from fleet_server.commands.sending import send_cancel
from fleet_server.domain.commands import ENDED, CommandState, after_answer
from fleet_server.models import CommandLogLine, DeviceCommand

TEXT_CHARS = 1000


def take(session: Session, device_id: str, answer: CommandAnswer, now: dt.datetime) -> None:
    """Take in an answer; one to a command of another device, or to none, changes nothing.

    A device that goes on with what is over here has not heard of that: it is told again.
    """
    row = session.get(DeviceCommand, answer.command_id, with_for_update=True)
    if row is None or row.device_id != device_id:
        return
    current = CommandState(row.state)
    if current in ENDED:
        if answer.phase is CommandPhase.RUNNING:
            send_cancel(session, row)
        return
    row.started_at = row.started_at or (None if answer.phase is CommandPhase.REFUSED else now)
    if row.kind == CommandKind.LOGS.value:
        _keep_lines(session, row, answer)
    wanted = after_answer(current, answer.phase)
    if wanted not in ENDED:
        row.state = wanted.value
        return
    row.result = None if answer.result is None else msgspec.to_builtins(answer.result)
    end(session, row, wanted, answer.code, plain(answer.detail), now, by=device_id)


def _keep_lines(session: Session, row: DeviceCommand, answer: CommandAnswer) -> None:
    """Each line once, whatever comes again; of very many the newest."""
    row.log_dropped += answer.dropped
    fresh = {one.sequence: one for one in answer.lines if one.sequence > row.log_sequence}
    if not fresh:
        return
    session.add_all(
        CommandLogLine(
            command_id=row.id,
            sequence=sequence,
            at=line.at,
            level=line.level,
            source=plain(line.source),
            logger=plain(line.logger),
            text=plain(line.text)[:TEXT_CHARS],
        )
        for sequence, line in sorted(fresh.items())
    )
    row.log_sequence, row.log_lines = max(fresh), row.log_lines + len(fresh)
    if row.log_lines > MOST_LINES:
        session.flush()
        repository.keep_newest_lines(session, row.id, MOST_LINES)
