"""Time zones by name, from the system's own tables."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from pathlib import Path

LOCAL = Path("/etc/localtime")


def zone_of(name: str) -> dt.tzinfo:
    """A time zone; the system's for an empty name, UTC where it has none.

    Raises:
        LookupError: when it is not known here; its first argument is the name.
    """
    if name:
        try:
            return zoneinfo.ZoneInfo(name)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise LookupError(name) from None
    try:
        with LOCAL.open("rb") as file:
            return zoneinfo.ZoneInfo.from_file(file, key="local")
    except (OSError, ValueError):
        return dt.UTC
