"""One replacement of the inference worker on purpose: the old one ends in order, the new one serves the same. Pure.

Until the new one has loaded what the old one served it takes no requests: they wait in the sockets' queues, which the
supervisor holds, and none is turned away.
"""

from __future__ import annotations

ENDS_WITHIN_S = 18.0  # the old one; then it is killed
LOADS_WITHIN_S = 60.0  # the new one; then it takes requests all the same
QUIET_S = 1.0  # without a load: what is not served by then does not come


class Replacement:
    """Where it is. The clock is passed in, in seconds.

    Args:
        served: models that the old one served.
        now: when the old one was told to end: from then on it takes no requests.

    Attributes:
        served: models that the old one served.
        serves: those that the new one does, once it is over.
        over: whether the new one takes requests.
        took_s: until then.
        old_gone: whether the old one has ended.
    """

    def __init__(self, served: frozenset[str], now: float) -> None:
        self.served = served
        self.serves: frozenset[str] = frozenset()
        self.over = False
        self.took_s = 0.0
        self.old_gone = False
        self._began_at, self._gone_at = now, now
        self._quiet_since: float | None = None

    def ended(self, now: float) -> bool:
        """A worker ended; whether it was the one that was told to."""
        expected, self.old_gone = not self.old_gone, True
        if expected:
            self._gone_at = now
        return expected

    def kills(self, now: float) -> bool:
        """Whether the old one does not end by itself."""
        return not self.old_gone and now - self._began_at >= ENDS_WITHIN_S

    def looked(self, serving: frozenset[str], now: float, *, loading: bool) -> bool:
        """Take in how the new one is; whether it may take requests now: then it is over.

        Args:
            serving: models that it serves.
            now: the time.
            loading: whether it loads something.
        """
        if not self.old_gone or self.over:
            return self.over
        self._quiet_since = None if loading else (now if self._quiet_since is None else self._quiet_since)
        quiet = self._quiet_since is not None and now - self._quiet_since >= QUIET_S
        if self.served <= serving or quiet or now - self._gone_at >= LOADS_WITHIN_S:
            self.over, self.serves, self.took_s = True, serving, now - self._began_at
        return self.over
