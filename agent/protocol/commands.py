"""Messages of commands: what the server asks a device to do at once, and what the device says of it.

A command's id is carried out once at most, however often the command comes. A peer may know fewer commands, or more:
their names are texts, and what a device knows is in its facts.
"""

from __future__ import annotations

import math
import re
from enum import StrEnum

import msgspec

from agent.protocol.limits import LIMITS

FEATURE = "commands"  # of agents that know them
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class CommandKind(StrEnum):
    """What a device may be asked to do."""

    RESTART_RUNTIME = "restart-runtime"  # the process that runs models is replaced
    LOGS = "logs"
    BENCHMARK = "benchmark"
    FACTS = "facts"  # measured again
    IDENTIFY = "identify"  # whatever the owner configured, such as a light that blinks


class CommandPhase(StrEnum):
    """What a device says of a command."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # it was not begun


class CommandArguments(msgspec.Struct, frozen=True, omit_defaults=True):
    """What commands are given; each reads what is its own.

    Attributes:
        lines: of `logs`: how many of the newest ones at first.
        follow: of `logs`: whether those that come later follow, until the time is over or it is cancelled.
        level: of `logs`: the least level, one of `LEVELS`.
        models: of `benchmark`: only these; empty for all that serve.
        seconds: of `benchmark`: how long each model is run.
    """

    lines: int = 200
    follow: bool = False
    level: str = "INFO"
    models: tuple[str, ...] = ()
    seconds: float = 5.0


class Command(msgspec.Struct, frozen=True):
    """Something to do, or to leave off.

    Attributes:
        command_id: the server's id; the same id is the same command, however often it is sent.
        kind: a `CommandKind`, or one of a newer server, which is refused.
        timeout_s: how long it may take from when the device begins.
        expires_at: when it is not to be begun any more, in Unix seconds.
        arguments: what it is given.
        cancel: leave it off, where it goes on; nothing is begun.
    """

    command_id: str
    kind: str
    timeout_s: float
    expires_at: float
    arguments: CommandArguments = CommandArguments()
    cancel: bool = False


class LogLine(msgspec.Struct, frozen=True):
    """One record of a log.

    Attributes:
        sequence: grows by one a record on the device, until its agent starts again; gaps are records that were lost,
            or of a lower level.
        at: in Unix seconds by the device's clock.
        level: one of `LEVELS`.
        source: `agent`, or `worker` for the process that runs models.
        logger: who logged it.
        text: without secrets; tracebacks included.
    """

    sequence: int
    at: float
    level: str
    source: str
    logger: str
    text: str


class ModelBenchmark(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one model did when it was run alone, in a process of its own.

    Attributes:
        model: its name.
        version: its version.
        runtime: runtime and version.
        provider: execution provider that really ran it.
        runs: how often one row was run after a warm-up.
        latency_p50_ms: of one row.
        latency_p95_ms: of one row.
        latency_p99_ms: of one row.
        rows_per_s: rows a second, one after another.
        batch: rows of a batch that were run together; 0 where the model takes one at a time.
        batch_rows_per_s: rows a second in such batches.
        golden: whether its golden inputs were run; else rows of zeros of the declared shapes.
        failure: why it was not measured; empty when it was.
    """

    model: str
    version: str
    runtime: str = ""
    provider: str = ""
    runs: int = 0
    latency_p50_ms: float = 0.0
    latency_p95_ms: float = 0.0
    latency_p99_ms: float = 0.0
    rows_per_s: float = 0.0
    batch: int = 0
    batch_rows_per_s: float = 0.0
    golden: bool = False
    failure: str = ""


class CommandResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of a command; each says what is its own.

    Attributes:
        models: of `restart-runtime`: those that are served again.
        took_s: of `restart-runtime`: from when the old process took no more requests until the new one did.
        benchmarks: of `benchmark`.
        changed: of `facts`: names of those that are others now.
        output: of `identify`: the end of what the configured program wrote.
        lines: of `logs`: how many were sent.
    """

    models: tuple[str, ...] = ()
    took_s: float = 0.0
    benchmarks: tuple[ModelBenchmark, ...] = ()
    changed: tuple[str, ...] = ()
    output: str = ""
    lines: int = 0


class CommandAnswer(msgspec.Struct, frozen=True):
    """How a command is. Said when it begins, with each batch of log lines, and when it is over.

    Attributes:
        command_id: as asked.
        phase: where it is.
        code: why it failed or was refused: `unknown_command`, `not_allowed`, `expired`, `busy`, `interrupted`, …;
            a text, so that an older server takes those it does not know.
        detail: the same for people, with what would mend it.
        result: when it is over.
        lines: of `logs`, in order.
        dropped: records before `lines` that were lost, because more came than the device keeps.
    """

    command_id: str
    phase: CommandPhase
    code: str = ""
    detail: str = ""
    result: CommandResult | None = None
    lines: tuple[LogLine, ...] = ()
    dropped: int = 0


def plain(text: str) -> str:
    """A text as it may be stored and shown on a terminal: control characters but line ends and tabs become `?`."""
    return _CONTROL.sub("?", text.encode(errors="replace").decode())


def problem_of(message: Command | CommandAnswer) -> str:
    """Why a message is out of bounds, in a few words; empty when it is not."""
    return _of_command(message) if isinstance(message, Command) else _of_answer(message)


def _of_command(message: Command) -> str:
    given = message.arguments
    checks = {
        "command_id": _is_name(message.command_id) and bool(message.command_id),
        "kind": _is_name(message.kind),
        "timeout_s": 0 < message.timeout_s <= LIMITS.command_s,
        "expires_at": 0 <= message.expires_at <= LIMITS.unix_seconds,
        "arguments.lines": 0 <= given.lines <= LIMITS.log_lines,
        "arguments.level": given.level in LEVELS,
        "arguments.models": len(given.models) <= LIMITS.deployments and all(map(_is_name, given.models)),
        "arguments.seconds": 0 < given.seconds <= LIMITS.command_s,
    }
    return _first(checks)


def _of_answer(message: CommandAnswer) -> str:
    result = message.result or CommandResult()
    checks = {
        "command_id": _is_name(message.command_id) and bool(message.command_id),
        "code": _is_name(message.code),
        "detail": _is_text(message.detail),
        "lines": len(message.lines) <= LIMITS.log_batch and all(map(_is_line, message.lines)),
        "dropped": 0 <= message.dropped < LIMITS.total,
        "result.models": len(result.models) <= LIMITS.deployments and all(map(_is_name, result.models)),
        "result.took_s": _is_amount(result.took_s),
        "result.benchmarks": len(result.benchmarks) <= LIMITS.deployments
        and all(map(_is_benchmark, result.benchmarks)),
        "result.changed": len(result.changed) <= LIMITS.facts_entries and all(map(_is_name, result.changed)),
        "result.output": _is_text(result.output),
        "result.lines": 0 <= result.lines < LIMITS.total,
    }
    return _first(checks)


def _first(checks: dict[str, bool]) -> str:
    return next((f"{field} is out of bounds" for field, holds in checks.items() if not holds), "")


def _is_line(line: LogLine) -> bool:
    return (
        0 <= line.sequence < LIMITS.total
        and 0 <= line.at <= LIMITS.unix_seconds
        and line.level in LEVELS
        and all(map(_is_name, (line.source, line.logger)))
        and _is_text(line.text)
    )


def _is_benchmark(one: ModelBenchmark) -> bool:
    numbers = (one.latency_p50_ms, one.latency_p95_ms, one.latency_p99_ms, one.rows_per_s, one.batch_rows_per_s)
    return (
        all(map(_is_name, (one.model, one.version, one.runtime, one.provider)))
        and all(map(_is_amount, numbers))
        and 0 <= one.runs < LIMITS.total
        and 0 <= one.batch < LIMITS.counter
        and _is_text(one.failure)
    )


def _is_name(text: str) -> bool:
    return len(text) <= LIMITS.name_chars and "\0" not in text


def _is_text(text: str) -> bool:
    return len(text) <= LIMITS.detail_chars and "\0" not in text


def _is_amount(number: float) -> bool:
    return math.isfinite(number) and 0 <= number < LIMITS.total
