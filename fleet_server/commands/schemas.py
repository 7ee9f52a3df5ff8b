"""HTTP shapes of commands."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from typing import Any, Self

from pydantic import Field, model_validator

from agent.protocol.commands import CommandKind
from agent.protocol.limits import LIMITS
from fleet_server.domain.commands import CommandState
from fleet_server.schemas import Name, Request, Response, example

MOST_DEVICES = 1000
MOST_OPEN = 8  # commands of one device
MOST_LINES = 5000  # of one command's log that are kept, the newest
DEFAULT_TIMEOUT_S = 300.0
_GIVEN = {CommandKind.LOGS: {"lines", "follow", "level"}, CommandKind.BENCHMARK: {"models", "seconds"}}
_OPTIONS = frozenset().union(*_GIVEN.values())


class LogLevel(StrEnum):
    """The least level of log lines."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"
    CRITICAL = "CRITICAL"


class CommandSpec(Request):
    """What a device is to do at once."""

    model_config = example(kind="logs", lines=100, follow=True, level="WARNING", timeout_s=600)

    kind: CommandKind
    timeout_s: float = Field(
        DEFAULT_TIMEOUT_S,
        gt=0,
        le=LIMITS.command_s,
        description="When it ends at the latest, in seconds from now; until then it waits for a device that is away.",
    )
    lines: int = Field(200, ge=0, le=LIMITS.log_lines, description="Of `logs`: how many of the newest come at first.")
    follow: bool = Field(
        default=False, description="Of `logs`: whether those that come later follow, until its time is over."
    )
    level: LogLevel = Field(LogLevel.INFO, description="Of `logs`: the least level.")
    models: list[Name] = Field(
        default_factory=list,
        max_length=LIMITS.deployments,
        description="Of `benchmark`: only these; all that serve when empty.",
    )
    seconds: float = Field(5.0, ge=0.1, le=600, description="Of `benchmark`: how long each model is run.")

    @model_validator(mode="after")
    def _has_what_is_its_own(self) -> Self:
        for name in sorted((self.model_fields_set & _OPTIONS) - _GIVEN.get(self.kind, set())):
            raise ValueError(f"{name} says nothing to {self.kind.value}: leave it out")
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """What was given, as `agent.protocol.commands.CommandArguments` has it."""
        return self.model_dump(mode="json", include=self.model_fields_set & _OPTIONS)


class CommandCreate(CommandSpec):
    """What some devices are to do at once."""

    model_config = example(kind="restart-runtime", query="site==plant7")

    devices: list[Name] = Field(default_factory=list, max_length=MOST_DEVICES, description="These devices.")
    query: str | None = Field(None, max_length=4096, description="Devices it holds for, in RSQL.")


class CommandView(Response):
    """A command to a device."""

    observed = frozenset(
        {"state", "code", "detail", "result", "log_lines", "log_dropped", "sent_at", "started_at", "finished_at"}
    )

    id: str
    device_id: str
    kind: str
    arguments: dict[str, Any] = Field(description="What was given; all else has its default.")
    state: CommandState
    code: str = Field(description="Why it failed, or was refused: not_allowed, busy, expired, interrupted, timeout, …")
    detail: str = Field(description="The same for people.")
    result: dict[str, Any] | None = Field(description="What came of it, by its kind; null until it is over.")
    log_lines: int = Field(description="Lines of its log that came.")
    log_dropped: int = Field(description="Lines that did not: more were logged than the device keeps.")
    created_by: str
    created_at: dt.datetime
    deadline_at: dt.datetime
    sent_at: dt.datetime | None
    started_at: dt.datetime | None
    finished_at: dt.datetime | None


class CommandLogLineView(Response):
    """A line of a device's log."""

    sequence: int = Field(description="Grows on the device; a gap is a line of a lower level, or one that was lost.")
    at: float = Field(description="Unix seconds, by the device's clock.")
    level: str
    source: str = Field(description="`agent`, or `worker` for the process that runs models.")
    logger: str
    text: str
