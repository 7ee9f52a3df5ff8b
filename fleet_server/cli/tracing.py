"""A span for a command, where the environment names a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`) or a trace.

`TRACEPARENT` names the span around the command, such as that of a build that runs it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from agent.protocol.trace import TraceParent, parse_traceparent
from fleet_server import spans
from fleet_server.cli.output import errors
from fleet_server.errors import UnavailableError
from fleet_server.otlp import SpanExporter, Targets, targets

SERVICE = "shoal-cli"
TIMEOUT_S = 2.0  # nobody waits longer for a collector that is away
TIMEOUTS = ("OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT")
STAYS = frozenset({"server", "up", "worker", "simulate"})  # commands that run until they are ended


@contextmanager
def traced(
    arguments: Sequence[str], command: Callable[[], Any], environment: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Whatever the command line asks of a server within is of one trace.

    Args:
        arguments: of the command line.
        command: makes all commands, as Click has them; it takes its time, so only where somebody traces.
        environment: with OpenTelemetry's variables.
    """
    around = parse_traceparent(environment.get("TRACEPARENT", ""))
    wanted = targets(None, environment, metrics=False)
    words = command_words(arguments, command()) if wanted.traces else []
    exporter = None if not words or words[0] in STAYS else _exporter(wanted, environment)
    if exporter is None:
        with spans.within(around):
            yield
        return
    name = " ".join(["shoal", *words])
    trace_id = around.trace_id if around is not None else spans.new_trace_id()
    own = TraceParent(trace_id, spans.new_span_id(), sampled=exporter.sampled(around, trace_id, name))
    started, status = time.time(), 0
    try:
        with spans.within(own):
            yield
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
        raise
    finally:
        if own.sampled:
            parent = around.span_id if around is not None else ""
            exporter.export(
                [
                    spans.Span(
                        name=name, trace_id=trace_id, span_id=own.span_id, parent_id=parent, started_at=started,
                        ended_at=time.time(), kind=spans.Kind.CLIENT, service=SERVICE,
                        attributes={"process.exit.code": status}, problem=f"exit code {status}" if status else "",
                    )
                ]
            )  # fmt: skip
        exporter.close()


def command_words(arguments: Sequence[str], command: Any) -> list[str]:
    """The names of the command that is asked for, without anything that people made up: `["rollout", "create"]`."""
    words: list[str] = []
    for one in arguments:
        following = getattr(command, "commands", {}).get(one)
        if following is not None:
            words.append(one)
            command = following
        elif words and not one.startswith("-"):
            break
    return words


def _exporter(wanted: Targets, environment: Mapping[str, str]) -> SpanExporter | None:
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a collector that is away is no matter of a command
    try:
        named = any(name in environment for name in TIMEOUTS)
        return SpanExporter(wanted.of("traces"), SERVICE, timeout_s=None if named else TIMEOUT_S)
    except UnavailableError as error:
        if sys.stderr.isatty():
            errors.print(error.detail)
        return None
