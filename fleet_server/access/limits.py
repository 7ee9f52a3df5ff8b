"""How much slower guessing gets: pure, with the clock passed in. Each server process counts for itself; no locks."""

from __future__ import annotations

from dataclasses import dataclass

from fleet_server.rates import KEYS


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
