"""Traces on the wire: W3C trace contexts, and when a device did the steps of a deployment. Pure.

A device makes no spans (docs/decisions/024): it says how long ago its steps began, by a clock that nobody sets while it
counts, and the server makes spans of that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
TRACEPARENT_CHARS = 256
MARKS = 32  # of a deployment
MARK = re.compile(r"[a-z_]{1,32}")
SWITCHED = "switched"  # the one mark that is no phase: the new version has begun to answer


@dataclass(frozen=True)
class TraceParent:
    """The span that is the parent of what follows (W3C Trace Context).

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 of them.
        sampled: whether what follows is recorded.
    """

    trace_id: str
    span_id: str
    sampled: bool = True

    @property
    def text(self) -> str:
        """As the header has it."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def parse_traceparent(text: str) -> TraceParent | None:
    """What a header says; None when it says nothing that counts. Versions to come say more behind the same fields."""
    found = _TRACEPARENT.fullmatch(text) if len(text) <= TRACEPARENT_CHARS else None
    if found is None or (text.startswith("00") and found[4]) or not int(found[1], 16) or not int(found[2], 16):
        return None
    return TraceParent(found[1], found[2], sampled=bool(int(found[3], 16) & 1))


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """A deployment came to a phase, or to `SWITCHED`, so many seconds before the report was made."""

    name: str
    ago_s: float


class TraceReport(msgspec.Struct, frozen=True):
    """When a device did the steps of one deployment.

    Attributes:
        traceparent: as the desired state had it when the deployment first came.
        marks: in the order in which they came, at most `MARKS`.
    """

    traceparent: str
    marks: tuple[Mark, ...] = ()


def marked(marks: Iterable[tuple[str, float]], name: str, at: float) -> tuple[tuple[str, float], ...]:
    """Marks with one more: a phase that goes on is one, and of too many the last is replaced.

    Args:
        marks: each with its time in seconds.
        name: of the new one.
        at: its time.
    """
    known = tuple(marks)
    before = [one for one, _ in known if (one == SWITCHED) == (name == SWITCHED)]
    if (before and before[-1] == name) and (name != SWITCHED or known[-1][0] == name):
        return known
    return (*known[: MARKS - 1], (name, at))
