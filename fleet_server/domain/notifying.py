"""When a route is told of a rule's alerts: pure. Those of one rule are told together, however many there are."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """How often a route wants to hear of one rule, in seconds.

    Attributes:
        wait_s: from the first news to when it is told, so that what comes with it is told with it.
        interval_s: between two tellings of news, at least.
        repeat_s: after which what fires and nobody acknowledged is told again; 0: never.
    """

    wait_s: float = 30.0
    interval_s: float = 300.0
    repeat_s: float = 4 * 3600.0


@dataclass(frozen=True)
class Told:
    """What a route knows of a rule.

    Attributes:
        told_at: when it was last told; None when it never was.
        news_since: of when the oldest news is that it was not told; None when there is none.
    """

    told_at: dt.datetime | None = None
    news_since: dt.datetime | None = None


def due(told: Told, timing: Timing, now: dt.datetime) -> bool:
    """Whether news is to be told now."""
    if told.news_since is None:
        return False
    at = told.news_since + dt.timedelta(seconds=timing.wait_s)
    if told.told_at is not None:
        at = max(at, told.told_at + dt.timedelta(seconds=timing.interval_s))
    return now >= at


def repeats(told: Told, timing: Timing, now: dt.datetime) -> bool:
    """Whether what still fires is to be told again now, where there is something of that kind."""
    if told.told_at is None or told.news_since is not None or not timing.repeat_s:
        return False
    return now >= told.told_at + dt.timedelta(seconds=timing.repeat_s)
