"""When what was not taken is sent again, and when it is given up. Pure."""

from __future__ import annotations

import datetime as dt
import email.utils
from dataclasses import dataclass
from enum import StrEnum

FIRST_S = 5.0
FACTOR = 3.0
LONGEST_S = 3 * 3600.0
GONE = 410


class DeliveryState(StrEnum):
    """Where a delivery is."""

    PENDING = "pending"  # it is to be sent
    DELIVERED = "delivered"  # the receiver took it
    DEAD = "dead"  # it was given up: look at it, and send it again


@dataclass(frozen=True)
class Outcome:
    """What became of one try: the status of the answer (None when none came), why, and when to try again if it said."""

    status: int | None
    detail: str
    retry_after_s: float | None = None

    @property
    def taken(self) -> bool:
        """Whether the receiver took it."""
        return self.status is not None and 200 <= self.status < 300


def next_try(attempts: int, outcome: Outcome, now: dt.datetime, end: dt.datetime, chance: float) -> dt.datetime | None:
    """When to try again; None to give it up.

    Exponential backoff with jitter of half the delay, or later where the receiver asks for it.

    Args:
        attempts: tries so far, this one counted.
        outcome: of the last.
        now: the time.
        end: when it is too old.
        chance: a random number from 0 to 1.
    """
    if outcome.status == GONE:
        return None
    delay = min(FIRST_S * FACTOR ** min(attempts - 1, 20), LONGEST_S) * (0.75 + chance / 2)
    found = now + dt.timedelta(seconds=max(delay, outcome.retry_after_s or 0.0))
    return found if found <= end else None


def retry_after(value: str | None, now: dt.datetime) -> float | None:
    """Seconds of a `Retry-After` header, which holds such or a date (RFC 9110); None where it holds neither."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdecimal():
        return float(min(int(text[:9]), 365 * 86400))
    try:
        date = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, ((date if date.tzinfo else date.replace(tzinfo=dt.UTC)) - now).total_seconds())
