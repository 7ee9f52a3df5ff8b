"""How fast telemetry is sent when the server is slow to store it. Pure.

A server that is behind must not be sent more for being behind: what waits for its answer is not sent again soon, and no
more with it, as TCP does it (Jacobson 1988: a window that grows with each answer and falls to one when one is missing,
and a wait that doubles).
"""

from __future__ import annotations

FIRST_S = 15.0
LONGEST_S = 120.0
AT_FIRST = 4
MOST = 20


class SendPace:
    """Of one device's spool.

    Args:
        first_s: seconds after which a batch is sent again, as long as answers come.
        most: batches that may be on their way together when all is well.

    Attributes:
        limit: batches that may be on their way together.
        resend_s: seconds after which one that was not answered is sent again.
    """

    __slots__ = ("_first_s", "_most", "limit", "resend_s")

    def __init__(self, *, first_s: float = FIRST_S, most: int = MOST) -> None:
        self._first_s, self._most = first_s, most
        self.limit, self.resend_s = min(AT_FIRST, most), first_s

    def stored(self) -> None:
        """The server answered."""
        self.limit, self.resend_s = min(2 * self.limit, self._most), self._first_s

    def late(self) -> None:
        """An answer is missing."""
        self.limit, self.resend_s = 1, min(2 * self.resend_s, LONGEST_S)

    def link_up(self) -> None:
        """There is a new connection: what was waited for may have gone with the old one."""
        self.limit, self.resend_s = min(AT_FIRST, self._most), self._first_s
