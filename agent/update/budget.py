"""What has come over each kind of link in the present period: pure but for the numbers, which outlive the process.

A period that has begun never begins again: when the clock is set back, what was counted goes on counting, until the
clock is past that period or the device has run for as long as a period lasts. What is counted is written down before it
is used, a block at a time, so that a crash can only count too much.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Protocol

from agent.protocol.delivery import Budget, Period

LENGTH_S = {Period.HOUR: 3600.0, Period.DAY: 86_400.0, Period.WEEK: 7 * 86_400.0, Period.MONTH: 31 * 86_400.0}
BLOCK = 1_000_000
NEVER = -1.0  # before every period
KEEP_RUN_S = 600.0  # how often is written down how long a period has run, while the clock is behind it


class Numbers(Protocol):
    """Where numbers are kept: the journal."""

    def number(self, name: str, default: float, /) -> float:
        """A kept number."""
        ...

    def keep_number(self, name: str, value: float, /) -> None:
        """Keep a number durably."""
        ...


@dataclass
class _Count:
    """Of one kind of link and period.

    Attributes:
        index: which period it is.
        used: bytes.
        written: bytes that were written down: at least `used`.
        ran_s: how long the device has run since the period began.
    """

    index: float
    used: float
    written: float
    ran_s: float
    kept_ran_s: float


class Ledger:
    """Counts bytes.

    Args:
        numbers: where they are kept.
        zone: of the device: where its days begin.
    """

    def __init__(self, numbers: Numbers, zone: dt.tzinfo) -> None:
        self._numbers = numbers
        self._zone = zone
        self._counts: dict[tuple[str, Period], _Count] = {}
        self._at: float | None = None

    def left(self, name: str, budget: Budget, now: float, wall: float) -> tuple[float, float]:
        """Bytes that are left of a budget, and when it is there again, in Unix seconds.

        Args:
            name: the kind of link.
            budget: of it.
            now: a clock that never goes back, in seconds.
            wall: the present time in Unix seconds.
        """
        count = self._count(name, budget.per, now, wall)
        behind = index_of(budget.per, wall, self._zone) < count.index
        ends = (
            wall + max(0.0, LENGTH_S[budget.per] - count.ran_s) if behind else period_end(budget.per, wall, self._zone)
        )
        return budget.bytes - count.used, ends

    def add(self, name: str, budget: Budget, size: int, now: float, wall: float) -> None:
        """Bytes came that count for a budget."""
        count = self._count(name, budget.per, now, wall)
        count.used += size
        if count.used > count.written:
            count.written = count.used + min(BLOCK, budget.bytes // 64)
            self._numbers.keep_number(f"{_key(name, budget.per)}:bytes", count.written)

    def close(self) -> None:
        """Write down what was really used."""
        for (name, per), count in self._counts.items():
            self._write(name, per, count, count.used)

    def _count(self, name: str, per: Period, now: float, wall: float) -> _Count:
        self._run(now)
        index = index_of(per, wall, self._zone)
        count = self._counts.get((name, per))
        if count is None:
            count = self._counts[name, per] = self._read(name, per)
        if index > count.index or (index < count.index and count.ran_s >= LENGTH_S[per]):
            count.index, count.used, count.ran_s = index, 0.0, 0.0
            self._write(name, per, count, 0.0)
        elif index < count.index and count.ran_s - count.kept_ran_s >= KEEP_RUN_S:
            self._write(name, per, count, count.written)
        return count

    def _run(self, now: float) -> None:
        passed = max(0.0, now - self._at) if self._at is not None else 0.0
        self._at = now
        for count in self._counts.values():
            count.ran_s += passed

    def _read(self, name: str, per: Period) -> _Count:
        key = _key(name, per)
        used = self._numbers.number(f"{key}:bytes", 0.0)
        ran_s = self._numbers.number(f"{key}:ran_s", 0.0)
        return _Count(self._numbers.number(f"{key}:index", NEVER), used, used, ran_s, ran_s)

    def _write(self, name: str, per: Period, count: _Count, written: float) -> None:
        key = _key(name, per)
        count.written, count.kept_ran_s = written, count.ran_s
        # The period first: a crash in between counts too much, never too little.
        self._numbers.keep_number(f"{key}:index", count.index)
        self._numbers.keep_number(f"{key}:ran_s", count.ran_s)
        self._numbers.keep_number(f"{key}:bytes", written)


def index_of(per: Period, wall: float, zone: dt.tzinfo) -> float:
    """Which period a time is in: a number that grows by one with each."""
    moment = dt.datetime.fromtimestamp(wall, zone)
    match per:
        case Period.HOUR:
            return float(wall // 3600)
        case Period.DAY:
            return float(moment.toordinal())
        case Period.WEEK:
            return float((moment.toordinal() - 1) // 7)  # day 1 was a Monday
        case Period.MONTH:
            return float(moment.year * 12 + moment.month - 1)


def period_end(per: Period, wall: float, zone: dt.tzinfo) -> float:
    """When the period that a time is in ends, in Unix seconds."""
    if per is Period.HOUR:
        return float((wall // 3600 + 1) * 3600)
    day = dt.datetime.fromtimestamp(wall, zone).date()
    if per is Period.DAY:
        following = day + dt.timedelta(days=1)
    elif per is Period.WEEK:
        following = day + dt.timedelta(days=7 - day.weekday())
    else:
        following = (day.replace(day=1) + dt.timedelta(days=32)).replace(day=1)
    return dt.datetime.combine(following, dt.time(), zone).timestamp()


def _key(name: str, per: Period) -> str:
    return f"budget:{name}:{per.value}"
