"""Sums of windows: what one did, or many, or an hour of them. Pure. Sums of sums are the sums of all."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from agent.protocol.histogram import merge
from fleet_server.telemetry.sketches import Cell, pack_cells, pack_latency, unpack_cells, unpack_latency

FLEET_S, HOUR_S, DAY_S = 300, 3600, 86_400
MOST = 1 << 62  # what a column holds; nothing honest comes near
CELLS = 65_536  # of a confusion matrix; nothing honest comes near


class Part(NamedTuple):
    """One stored row: a window, or a roll-up of windows.

    Attributes:
        series_id: of what it is.
        started_at: of the first window.
        ended_at: of the last window.
        busy_s: seconds of windows that had requests; None of a window, which says it by its own times.
        requests: answered, errors included.
        errors: that failed.
        rejected: refused before the model saw them.
        items: rows of all batches.
        latency: packed (`sketches`).
        confusion: packed.
    """

    series_id: int
    started_at: dt.datetime
    ended_at: dt.datetime
    busy_s: float | None
    requests: int
    errors: int
    rejected: int
    items: int
    latency: bytes
    confusion: bytes


@dataclass
class Total:
    """A sum of parts; of one series, or of several."""

    started_at: dt.datetime
    ended_at: dt.datetime
    busy_s: float = 0.0
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    items: int = 0
    latency: dict[int, int] = field(default_factory=dict)
    confusion: Counter[tuple[int, int]] = field(default_factory=Counter)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Self | None:
        """The sum of some parts; None of none."""
        total: Self | None = None
        for part in parts:
            if total is None:
                total = cls(part.started_at, part.ended_at)
            total.add(part)
        return total

    def add(self, part: Part) -> None:
        """Add a row."""
        busy_s = part.busy_s
        if busy_s is None:
            busy_s = (part.ended_at - part.started_at).total_seconds() if part.requests else 0.0
        self._count(part, busy_s)
        merge(self.latency, unpack_latency(part.latency))
        for label, predicted, count in unpack_cells(part.confusion):
            self._label(label, predicted, count)

    def merge(self, other: Total) -> None:
        """Add another sum."""
        self._count(other, other.busy_s)
        merge(self.latency, other.latency)
        for label, predicted, count in other.cells:
            self._label(label, predicted, count)

    def _count(self, other: Part | Total, busy_s: float) -> None:
        self.started_at, self.ended_at = min(self.started_at, other.started_at), max(self.ended_at, other.ended_at)
        self.busy_s += busy_s
        self.requests += other.requests
        self.errors += other.errors
        self.rejected += other.rejected
        self.items += other.items

    def _label(self, label: int, predicted: int, count: int) -> None:
        if (label, predicted) in self.confusion or len(self.confusion) < CELLS:
            self.confusion[label, predicted] += count

    @property
    def cells(self) -> list[Cell]:
        """The confusion matrix."""
        return [(label, predicted, count) for (label, predicted), count in self.confusion.items()]

    def values(self) -> dict[str, object]:
        """The columns of a roll-up that hold it."""
        return {
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "busy_s": self.busy_s,
            "requests": min(self.requests, MOST),
            "errors": min(self.errors, MOST),
            "rejected": min(self.rejected, MOST),
            "items": min(self.items, MOST),
            "latency": pack_latency({bucket: min(count, MOST) for bucket, count in self.latency.items()}),
            "confusion": pack_cells((label, predicted, min(count, MOST)) for label, predicted, count in self.cells),
        }


@dataclass
class FleetTotal:
    """What all models of a fleet did: requests, errors, and a histogram of latency."""

    requests: int = 0
    errors: int = 0
    latency: dict[int, int] = field(default_factory=dict)

    def add(self, requests: int, errors: int, latency: bytes) -> None:
        """Add what a row says; `latency` is packed (`sketches`)."""
        self.requests += requests
        self.errors += errors
        merge(self.latency, unpack_latency(latency))

    def merge(self, other: FleetTotal) -> None:
        """Add another sum."""
        self.requests += other.requests
        self.errors += other.errors
        merge(self.latency, other.latency)

    def values(self) -> tuple[int, int, bytes]:
        """The columns of a row that hold it."""
        latency = pack_latency({bucket: min(count, MOST) for bucket, count in self.latency.items()})
        return min(self.requests, MOST), min(self.errors, MOST), latency


def period_of(at: dt.datetime, step_s: int) -> dt.datetime:
    """The beginning of the period that a time is in; periods begin at whole multiples of their length, in UTC."""
    seconds = int(at.timestamp()) // step_s * step_s
    return dt.datetime.fromtimestamp(seconds, dt.UTC)
