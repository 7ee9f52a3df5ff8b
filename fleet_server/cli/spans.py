"""Spans of time as people write them on the command line."""

from __future__ import annotations

import re

from fleet_server.cli.output import fail

_SPAN = re.compile(r"^(\d{1,6})([smhd])$", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds_of(text: str, option: str) -> float:
    """A span such as `90s`, `5m`, `2h` or `1d` in seconds; plain numbers are seconds."""
    found = _SPAN.match(text)
    if found:
        return float(int(found[1]) * _UNITS[found[2]])
    try:
        return float(text)
    except ValueError:
        raise fail(f"{option}: {text!r} is no time such as 90s, 5m, 2h or 1d", 2) from None
