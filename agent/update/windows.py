"""Maintenance windows in time zones: pure. The present time and the zones are passed in."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence

from agent.protocol.delivery import Window

LOOK_AHEAD_DAYS = 9  # a weekly window that an hour was taken from comes again within that time

Zones = Callable[[str], dt.tzinfo]  # by name, the empty one for the device's own; LookupError where it is not known


def opens_at(windows: Sequence[Window], now: float, zones: Zones) -> float | None:
    """When one of some windows is open: `now` where one is, else the next time in Unix seconds.

    Days and times are those that clocks on a wall show. Where clocks go forward, a window that begins in the hour that
    is left out is as long as ever; where they go back, times in the hour that comes twice mean the first one.

    Args:
        windows: None of them: always open.
        now: Unix seconds.
        zones: finds time zones.

    Raises:
        LookupError: for a zone that is not known.
    """
    if not windows:
        return now
    return min((_opens_at(one, now, zones(one.zone)) for one in windows), key=lambda at: at if at is not None else 1e18)


def _opens_at(window: Window, now: float, zone: dt.tzinfo) -> float | None:
    today = dt.datetime.fromtimestamp(now, zone).date()
    for offset in range(-1, LOOK_AHEAD_DAYS):
        day = today + dt.timedelta(days=offset)
        if day.weekday() not in window.days:
            continue
        start, end = _span(window, day, zone)
        if now < end:
            return max(now, start)
    return None


def _span(window: Window, day: dt.date, zone: dt.tzinfo) -> tuple[float, float]:
    last = day if window.end > window.start else day + dt.timedelta(days=1)
    start, end = _moment(day, window.start, zone), _moment(last, window.end, zone)
    if end <= start:  # it begins in an hour that is left out, and ends right after it
        start = _moment(day, window.start, zone, fold=1)
    return start, end


def _moment(day: dt.date, minutes: int, zone: dt.tzinfo, fold: int = 0) -> float:
    wall = dt.datetime.combine(day, dt.time(), zone) + dt.timedelta(minutes=minutes)
    return wall.replace(fold=fold).timestamp()
