"""Spans of traces, as data: who finds one out says when it began and ended, and somebody exports it. Pure.

Nothing here knows OpenTelemetry: rollouts last for days and over restarts of servers, so their spans are made when they
are over, of what the database has, under ids that follow from the ids of rows. Every server makes the same ones.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from agent.protocol.trace import TraceParent

if TYPE_CHECKING:  # the command line has spans too, and no database
    from sqlalchemy.orm import Session

NOTED = "shoal_spans"
_current: ContextVar[TraceParent | None] = ContextVar("shoal_span", default=None)


class Kind(StrEnum):
    """What a span is to the one around it, as OpenTelemetry has it."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"
    PRODUCER = "producer"
    CONSUMER = "consumer"


@dataclass(frozen=True)
class Span:
    """One thing that was done.

    Attributes:
        name: of few different ones.
        trace_id: 32 hexadecimal digits.
        span_id: 16 of them.
        parent_id: of the span around it; empty for none.
        started_at: in Unix seconds.
        ended_at: likewise; None for the end of the transaction that it is noted in.
        kind: what it is to the one around it.
        service: who did it.
        instance: which of them, such as a device.
        attributes: what is known of it.
        problem: why it failed; empty when it did not.
    """

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    started_at: float
    ended_at: float | None = None
    kind: Kind = Kind.INTERNAL
    service: str = "shoal-server"
    instance: str = ""
    attributes: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    problem: str = ""


Sink = Callable[[Sequence[Span]], None]


def new_trace_id() -> str:
    """A trace id by chance."""
    return secrets.token_hex(16)


def new_span_id() -> str:
    """A span id by chance."""
    return secrets.token_hex(8)


def span_id_of(*parts: object) -> str:
    """The span id of something that has ids of its own: always the same."""
    text = "\0".join(str(part) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def current() -> TraceParent | None:
    """The span that is open here; None where nothing is traced."""
    return _current.get()


@contextmanager
def within(parent: TraceParent | None) -> Iterator[None]:
    """What is done within belongs to a span."""
    token = _current.set(parent)
    try:
        yield
    finally:
        _current.reset(token)


def note(session: Session, *spans: Span) -> None:
    """Spans of what a transaction did; they are exported when it is committed, and forgotten when it is not."""
    session.info.setdefault(NOTED, []).extend(spans)


def noted(session: Session) -> list[Span]:
    """What was noted, with an end for what ended with the transaction, which is now."""
    found: list[Span] = session.info.get(NOTED, [])
    now = time.time()
    return [one if one.ended_at is not None else replace(one, ended_at=now) for one in found]
