"""How often somebody may ask: pure, with the clock passed in. Each server process counts for itself; no locks."""

from __future__ import annotations

from dataclasses import dataclass

KEYS = 20_000  # more are forgotten, oldest first: memory stays bounded under a flood of addresses


@dataclass
class _Bucket:
    tokens: float
    at: float


class TokenBuckets:
    """A token bucket a key: `burst` requests at once, refilled by `per_s` a second."""

    def __init__(self, *, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: str, now: float) -> float:
        """Take one; returns 0, or in how many seconds there will be one.

        Args:
            key: who asks.
            now: a monotonic time in seconds.
        """
        bucket = self._buckets.pop(key, None) or _Bucket(self._burst, now)
        bucket.tokens = min(self._burst, bucket.tokens + max(0.0, now - bucket.at) * self._per_s)
        bucket.at = now
        self._buckets[key] = bucket
        if len(self._buckets) > KEYS:
            del self._buckets[next(iter(self._buckets))]
        if bucket.tokens < 1.0:
            return (1.0 - bucket.tokens) / self._per_s
        bucket.tokens -= 1.0
        return 0.0


@dataclass
class _Guesses:
    failed: int
    until: float
    at: float


class GuessBrake:
    """Slows down guessing: after `free` failures a key waits, twice as long after each one more, at most `longest_s`.

    A success, or `forget_s` without a failure, clears it.
    """

    def __init__(self, *, free: int = 5, longest_s: float = 300.0, forget_s: float = 3600.0) -> None:
        self._free = free
        self._longest_s = longest_s
        self._forget_s = forget_s
        self._guesses: dict[str, _Guesses] = {}

    def wait_s(self, key: str, now: float) -> float:
        """In how many seconds a key may guess again; 0 for now."""
        seen = self._guesses.get(key)
        return 0.0 if seen is None else max(0.0, seen.until - now)

    def failed(self, key: str, now: float) -> None:
        """Count a failure."""
        seen = self._guesses.pop(key, None)
        count = 1 if seen is None or now - seen.at > self._forget_s else seen.failed + 1
        wait = 0.0 if count < self._free else min(self._longest_s, 2.0 ** min(count - self._free, 30))
        self._guesses[key] = _Guesses(count, now + wait, now)
        if len(self._guesses) > KEYS:
            del self._guesses[next(iter(self._guesses))]

    def succeeded(self, key: str) -> None:
        """Forget the failures of a key."""
        self._guesses.pop(key, None)
