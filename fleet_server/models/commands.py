"""Commands to devices, and the lines of their logs that came."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class DeviceCommand(Base):
    """Somebody asked a device to do something. `state` is `fleet_server.domain.commands.CommandState`."""

    __tablename__ = "device_commands"
    __table_args__ = (
        Index(None, "fleet_id", "id"),
        Index(None, "device_id", "state"),
        Index(None, "state", "deadline_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    kind: Mapped[str]  # agent.protocol.commands.CommandKind
    arguments: Mapped[dict[str, Any]]  # agent.protocol.commands.CommandArguments, as JSON
    state: Mapped[str]
    code: Mapped[str] = mapped_column(default="")
    detail: Mapped[str] = mapped_column(default="")
    result: Mapped[dict[str, Any] | None]  # agent.protocol.commands.CommandResult, as JSON
    log_lines: Mapped[int] = mapped_column(default=0)  # that came
    log_dropped: Mapped[int] = mapped_column(default=0)  # that did not
    log_sequence: Mapped[int] = mapped_column(default=0)  # of the newest line that came
    created_by: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    deadline_at: Mapped[dt.datetime]
    sent_at: Mapped[dt.datetime | None]  # the last time
    started_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]


class CommandLogLine(Base):
    """A line of a device's log that a command asked for."""

    __tablename__ = "command_log_lines"

    command_id: Mapped[str] = mapped_column(ForeignKey("device_commands.id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]  # Unix seconds by the device's clock
    level: Mapped[str]
    source: Mapped[str]
    logger: Mapped[str]
    text: Mapped[str]
