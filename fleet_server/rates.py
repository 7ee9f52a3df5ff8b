"""Token buckets: how fast somebody may do something. Pure; a clock is passed in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

KEYS = 20_000  # more are forgotten: memory stays bounded under a flood of addresses


class TokenBucket:
    """Holds up to `burst` units and gains `rate` units a second; each act takes some."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at = now

    def level(self, now: float) -> float:
        """How much is there."""
        self._level = min(self._burst, self._level + max(0.0, now - self._at) * self._rate)
        self._at = now
        return self._level

    def has(self, amount: float, now: float) -> bool:
        """Whether that much is there."""
        return self.level(now) >= amount

    def take(self, amount: float, now: float) -> bool:
        """Take that much when it is there; says whether it was."""
        if not self.has(amount, now):
            return False
        self._level -= amount
        return True

    def wait_s(self, amount: float, now: float) -> float:
        """In how many seconds that much will be there; 0 when it is."""
        return 0.0 if self.has(amount, now) else (amount - self._level) / self._rate

    def give(self, amount: float) -> None:
        """Give back what was taken."""
        self._level = min(self._burst, self._level + amount)


class KeyedBuckets:
    """One bucket a key, for at most `keys` of them: those not used for longest are forgotten, and begin anew full."""

    def __init__(self, rate: float, burst: float, keys: int = KEYS) -> None:
        self._rate = rate
        self._burst = burst
        self._keys = keys
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def of(self, key: Hashable, now: float) -> TokenBucket:
        """The bucket of a key."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(self._rate, self._burst, now)
            if len(self._buckets) > self._keys:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return bucket
