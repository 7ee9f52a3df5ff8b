"""How fast downloads may go on, and when: rates, budgets and windows of the device and of each download. Pure.

All bytes of artifacts are counted here, by whatever way they come, and those of samples that are sent. The stricter of
what the device's configuration and what the server's policy say holds.
"""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from agent.protocol.delivery import (
    METERED,
    Budget,
    DeliveryPolicy,
    Period,
    Waiting,
    WaitingFor,
    Window,
    size_text,
    window_text,
)
from agent.protocol.facts import LinkFacts
from agent.update.budget import Ledger
from agent.update.download import WINDOW, Allowance
from agent.update.windows import Zones, opens_at

BURST_S = 1.0
BURST_CHUNKS = 2
MARGIN = 2 * WINDOW  # chunks of a budget: with less left than that, no broadcast may bring what was not asked for


@dataclass(frozen=True)
class OwnLimits:
    """What the device's configuration says: bytes a second (0: no bound), and budgets by kind of link."""

    rate: int = 0
    budgets: dict[str, tuple[Budget, ...]] = field(default_factory=dict)


class Memory:
    """Numbers that nobody keeps: for a device without budgets."""

    def number(self, _name: str, default: float) -> float:
        """The default."""
        return default

    def keep_number(self, _name: str, _value: float) -> None:
        """Nothing is kept."""


@dataclass
class _Bucket:
    """What may come at once at some rate; below 0 where more came than that."""

    level: float
    at: float


class Pacer:
    """Says how downloads may go on.

    Args:
        ledger: counts what comes; it must keep it where there are budgets.
        own: the configuration's limits.
        zones: finds time zones.
        clock: the present time in Unix seconds.
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        own: OwnLimits | None = None,
        zones: Zones = lambda _name: dt.UTC,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger or Ledger(Memory(), dt.UTC)
        self._own = own or OwnLimits()
        self._zones = zones
        self._clock = clock
        self._link = LinkFacts()
        self._buckets: dict[int, _Bucket] = {}
        self._counted: dict[tuple[str, Period], Budget] = {}

    def set_link(self, link: LinkFacts) -> None:
        """From now on bytes come over this link."""
        self._link = link

    def received(self, size: int, now: float) -> None:
        """Bytes of artifacts came, wanted or not, or samples went: both cost the link the same."""
        for rate, bucket in self._buckets.items():
            self._fill(rate, bucket, now)
            bucket.level -= size
        for (name, _), budget in self._counted.items():
            if self._applies(name):
                self._ledger.add(name, budget, size, now, self._clock())

    def download(self, policy: DeliveryPolicy, chunk_size: int, now: float) -> Allowance | Waiting:
        """How a download may go on now, or what it must wait for."""
        wall = self._clock()
        waiting = self._window(policy.download, WaitingFor.DOWNLOAD_WINDOW, "downloads", wall)
        if waiting is not None:
            return waiting
        window, alone = WINDOW, False
        for name, budget in self._budgets(policy):
            left, again = self._ledger.left(name, budget, now, wall)
            if left < chunk_size:
                return _used_up(name, budget, left, again)
            if left < MARGIN * chunk_size:
                # What comes twice, because it was thought lost, counts too: hence half.
                window, alone = min(window, max(1, int(left // (2 * chunk_size)))), True
        rate = min((one for one in (self._own.rate, policy.rate) if one), default=0)
        if not rate:
            return Allowance(window, alone=alone)
        bucket = self._buckets.setdefault(rate, _Bucket(self._burst(rate, chunk_size), now))
        self._fill(rate, bucket, now, self._burst(rate, chunk_size))
        window = min(window, max(0, int(bucket.level // chunk_size)))
        # One that must be slower than its fleet's policy says does not slow the others down.
        alone = alone or rate != policy.rate
        return Allowance(window, 0.0 if window else (chunk_size - bucket.level) / rate, alone)

    def activation(self, policy: DeliveryPolicy) -> Waiting | None:
        """What a deployment that has come must wait for before it may begin to serve."""
        return self._window(policy.activate, WaitingFor.ACTIVATE_WINDOW, "new versions", self._clock())

    def close(self) -> None:
        """Write down what was really used."""
        self._ledger.close()

    def _budgets(self, policy: DeliveryPolicy) -> Iterator[tuple[str, Budget]]:
        """Those that hold for the link. All are counted from now on, those of other links too."""
        for source in (self._own.budgets, policy.budgets):
            for name, budgets in source.items():
                for budget in budgets:
                    known = self._counted.get((name, budget.per))
                    if known is None or budget.bytes < known.bytes:
                        self._counted[name, budget.per] = budget
                    if self._applies(name):
                        yield name, budget

    def _applies(self, name: str) -> bool:
        return name == self._link.type or (name == METERED and self._link.metered)

    def _window(self, windows: tuple[Window, ...], reason: WaitingFor, what: str, wall: float) -> Waiting | None:
        try:
            at = opens_at(windows, wall, self._zones)
        except LookupError as error:
            detail = f"the time zone {error.args[0]!r} is not known on this device: install its tzdata"
            return Waiting(WaitingFor.TIME_ZONE, detail)
        if at is not None and at <= wall:
            return None
        return Waiting(reason, f"{what} are let in at {', '.join(map(window_text, windows))}", at)

    @staticmethod
    def _burst(rate: int, chunk_size: int) -> float:
        return max(rate * BURST_S, float(BURST_CHUNKS * chunk_size))

    @staticmethod
    def _fill(rate: int, bucket: _Bucket, now: float, burst: float = float("inf")) -> None:
        bucket.level = min(burst, bucket.level + max(0.0, now - bucket.at) * rate)
        bucket.at = now


def _used_up(name: str, budget: Budget, left: float, again: float) -> Waiting:
    used = budget.bytes - left
    detail = f"of {size_text(budget.bytes)} per {budget.per.value} over {name} links {size_text(used)} are used"
    # To the minute: a clock's jitter is no news to be journalled and reported.
    return Waiting(WaitingFor.BUDGET, detail + ("" if left > 0 else ", which is all"), math.ceil(again / 60) * 60.0)
