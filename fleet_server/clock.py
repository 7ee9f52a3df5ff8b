"""What time it is: the server keeps time in UTC and shows it with its zone."""

from __future__ import annotations

import datetime as dt


def utc_now() -> dt.datetime:
    """The present time, with its zone."""
    return dt.datetime.now(dt.UTC)
