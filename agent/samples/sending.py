"""One upload as it goes: pieces in order, a few ahead of what the server has confirmed. Pure.

At first, and after every new connection, one piece is sent, whose answer says how far an earlier run has come.
"""

from __future__ import annotations

from agent.protocol.limits import LIMITS

PIECE = LIMITS.sample_piece_bytes
AHEAD = 4  # pieces
AGAIN_S = 15.0


class Sending:
    """Which pieces of a file are sent when.

    Args:
        size: of the file, in bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._sent = 0
        self._known = False  # what the server has, since the connection began
        self._progress_at = 0.0
        self.received = 0

    def link_up(self) -> None:
        """The connection is a new one: what was sent before may not have come."""
        self._sent, self._known = self.received, False

    def acknowledged(self, received: int, now: float) -> None:
        """The server has so many bytes."""
        self.received = min(received, self._size)
        self._sent = max(self._sent, self.received) if self._known else self.received
        self._known, self._progress_at = True, now

    def due(self, pieces: int, now: float) -> list[tuple[int, int]]:
        """What is to be sent now: where pieces begin, and how long they are.

        Args:
            pieces: how many may be on their way.
            now: of a clock that is never set, in seconds.
        """
        if self._sent > self.received and now - self._progress_at >= AGAIN_S:
            self.link_up()
        ahead = min(pieces, AHEAD) if self._known else min(pieces, 1)
        due: list[tuple[int, int]] = []
        while self._sent < min(self._size, self.received + ahead * PIECE):
            length = min(PIECE, self._size - self._sent)
            if not due and self._sent == self.received:
                self._progress_at = now
            due.append((self._sent, length))
            self._sent += length
        return due
