"""How an artifact may come to a device: rates, budgets by kind of link, maintenance windows; and the word for waiting.

People write budgets and windows as texts, in configurations and in requests; they are read here.
"""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

from agent.protocol.limits import LIMITS

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DAY_MINUTES = 24 * 60
SMALLEST_BUDGET = 1_000_000  # a few chunks
_SIZE = re.compile(r"^(\d{1,9}(?:\.\d{1,6})?) ?(B|kB|MB|GB)\Z")
_WINDOW = re.compile(
    r"^(?:(?P<days>[A-Za-z,-]{3,60}) )?(?P<start>\d\d:\d\d)-(?P<end>\d\d:\d\d)(?: (?P<zone>\S{1,64}))?\Z"
)
_ZONE = re.compile(r"^[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+)*\Z")


class LinkType(StrEnum):
    """What a device's way to the server begins with."""

    ETHERNET = "ethernet"
    WIFI = "wifi"
    CELLULAR = "cellular"
    UNKNOWN = "unknown"


METERED = "metered"  # names, among budgets, whatever link costs by the byte
BUDGETED = (LinkType.ETHERNET.value, LinkType.WIFI.value, LinkType.CELLULAR.value, METERED)


class Period(StrEnum):
    """After which a budget is there again; days begin at midnight where the device is."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"


class Budget(msgspec.Struct, frozen=True):
    """Bytes of artifacts that may come in a period."""

    bytes: int
    per: Period


class Window(msgspec.Struct, frozen=True):
    """When something may be done.

    Attributes:
        days: on which it begins, 0 for Monday.
        start: minutes after midnight.
        end: minutes after midnight, of the next day where it is not after `start`; 1440 for midnight.
        zone: name of a time zone; empty for the device's own.
    """

    days: tuple[int, ...]
    start: int
    end: int
    zone: str = ""


class DeliveryPolicy(msgspec.Struct, frozen=True):
    """How an artifact may come to a device. What is not given is not bounded.

    Attributes:
        rate: bytes a second; 0 for no bound.
        budgets: by kind of link (`ethernet`, `wifi`, `cellular`), or `metered`; of several all hold.
        download: when it may be downloaded; empty for always.
        activate: when it may begin to serve; empty for always.
    """

    rate: int = 0
    budgets: dict[str, tuple[Budget, ...]] = {}
    download: tuple[Window, ...] = ()
    activate: tuple[Window, ...] = ()


class WaitingFor(StrEnum):
    """What a deployment waits for."""

    BUDGET = "budget"
    DOWNLOAD_WINDOW = "download_window"
    ACTIVATE_WINDOW = "activate_window"
    TIME_ZONE = "time_zone"


class Waiting(msgspec.Struct, frozen=True):
    """A deployment that stands still on purpose.

    Attributes:
        reason: what it waits for.
        detail: a sentence for people.
        until: when it will go on, in Unix seconds by the device's clock; None when that is not known.
    """

    reason: WaitingFor
    detail: str
    until: float | None = None


def read_size(text: str) -> int:
    """Bytes of a text such as `50 MB` (1 MB is 1,000,000 bytes).

    Raises:
        ValueError: saying how it is written.
    """
    found = _SIZE.match(text.strip())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if not 0 < size < LIMITS.total:
        raise ValueError(f"{text[:40]!r} is not a size above 0 such as 500 kB, 50 MB or 1.5 GB")
    return size


def read_rate(text: str) -> int:
    """Bytes a second of a text such as `2 MB/s`.

    Raises:
        ValueError: saying how it is written.
    """
    size, slash, unit = text.strip().rpartition("/")
    if not slash or unit.strip() != "s":
        raise ValueError(f"{text[:40]!r} is not a rate such as 500 kB/s or 2 MB/s")
    return read_size(size)


def read_budget(text: str) -> Budget:
    """A budget of a text such as `50 MB per day`.

    Raises:
        ValueError: saying how it is written, or that not even one chunk would fit.
    """
    size, _, period = text.strip().partition(" per ")
    try:
        budget = Budget(read_size(size), Period(period.strip()))
    except ValueError:
        wanted = "50 MB per day (per hour, day, week or month)"
        raise ValueError(f"{text[:40]!r} is not a budget such as {wanted}") from None
    if budget.bytes < SMALLEST_BUDGET:
        raise ValueError(f"{text[:40]!r} is too little to download anything: give at least 1 MB")
    return budget


def read_budgets(values: dict[str, str]) -> dict[str, tuple[Budget, ...]]:
    """Budgets by kind of link.

    Raises:
        ValueError: naming the one that is wrong.
    """
    for name in values:
        if name not in BUDGETED:
            raise ValueError(f"there is no kind of link {name[:40]!r}: there are {', '.join(BUDGETED)}")
    found: dict[str, tuple[Budget, ...]] = {}
    for name, text in values.items():
        try:
            found[name] = (read_budget(text),)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def read_window(text: str) -> Window:
    """A window of a text such as `Mon-Fri 22:00-04:00 Europe/Berlin`; days and zone may be left out.

    Raises:
        ValueError: saying how it is written.
    """
    found = _WINDOW.match(text.strip())
    if found is None:
        raise ValueError(f"{text[:80]!r} is not a window such as Mon-Fri 22:00-04:00 Europe/Berlin, or 01:00-05:00")
    zone = found["zone"] or ""
    if zone and not _ZONE.match(zone):
        raise ValueError(f"{zone!r} is not the name of a time zone such as Europe/Berlin or UTC")
    start, end = _minutes(found["start"]), _minutes(found["end"])
    if start in {DAY_MINUTES, end}:
        raise ValueError(f"{text[:80]!r} begins and ends at the same time: say 00:00-24:00 for a whole day")
    return Window(_days(found["days"]) if found["days"] else tuple(range(7)), start, end, zone)


def window_text(window: Window) -> str:
    """A window as people write it."""
    days = "" if len(window.days) == 7 else ",".join(DAYS[day] for day in window.days) + " "
    times = "-".join(f"{minutes // 60:02}:{minutes % 60:02}" for minutes in (window.start, window.end))
    return f"{days}{times}{' ' + window.zone if window.zone else ''}"


def size_text(size: float) -> str:
    """Bytes as people write them."""
    for unit, factor in reversed(UNITS.items()):
        if abs(size) >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def _minutes(text: str) -> int:
    hours, minutes = int(text[:2]), int(text[3:])
    if hours * 60 + minutes > DAY_MINUTES or minutes > 59:
        raise ValueError(f"{text!r} is not a time of day from 00:00 to 24:00")
    return hours * 60 + minutes


def _days(text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError(f"{part[:20]!r} is not a day or days such as Sat or Mon-Fri ({', '.join(DAYS)})")
        day, end = DAYS.index(first), DAYS.index(last or first)
        found.add(day)
        while day != end:
            day = (day + 1) % 7
            found.add(day)
    return tuple(sorted(found))
