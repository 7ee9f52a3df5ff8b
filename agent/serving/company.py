"""Whether several are asked, or ask, at present: then none may keep the others waiting."""

from __future__ import annotations

LONG_S = 1.0  # who was not asked, or did not ask, for so long does not at present


class Company:
    """The artifacts of one worker, or the connections to it. Used by one event loop alone."""

    def __init__(self) -> None:
        self._last: object = None
        self._together_at = -LONG_S

    def is_alone(self, one: object, now: float) -> bool:
        """One of them is asked, or asks, now in seconds of any clock: whether no other has lately."""
        if one is not self._last:
            if self._last is not None:
                self._together_at = now
            self._last = one
        return now - self._together_at >= LONG_S
