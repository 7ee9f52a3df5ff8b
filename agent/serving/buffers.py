"""Memory that requests arrive in, used again and again.

New memory is cleared by the kernel a page at a time when it is first touched, which costs a request of 150 KB about
as much as all the rest that is done for it. Thread-safe.
"""

from __future__ import annotations

import sys
import threading

import numpy as np

from agent.runtimes.base import Array

ALIGNED = 64  # bytes: what vector instructions read at once
PAGE = 4096
LARGEST = 1 << 20  # bytes: for what is larger, its copying and its inference cost more than its pages
KEPT_BYTES = 4 << 20
UNUSED = 2  # references to what is kept: its holder's, and that of the call that counts them


class _Piece:
    """A piece of memory.

    Attributes:
        whole: the memory; who has a view of it refers to it.
        address: of its first byte.
    """

    def __init__(self, size: int) -> None:
        self.whole: Array = np.empty(size, np.uint8)
        self.address: int = self.whole.ctypes.data

    def fits(self, needed: int) -> bool:
        return needed <= self.whole.nbytes <= 2 * needed and sys.getrefcount(self.whole) == UNUSED

    def view(self, size: int, head: int) -> memoryview:
        start = -(self.address + head) % ALIGNED
        return memoryview(self.whole.data)[start : start + size]


class Buffers:
    """Pieces of memory, kept until nothing refers to them, and then given out again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[_Piece] = []  # what was given out last comes last
        self._bytes = 0

    def take(self, size: int, head: int = 0) -> memoryview:
        """Room for some bytes, which is nobody else's until the last view of it has gone. What is in it is undefined.

        Args:
            size: bytes.
            head: so many of them come before those that are to lie aligned.
        """
        needed = size + ALIGNED
        if needed > LARGEST:
            return _Piece(needed).view(size, head)
        with self._lock:
            index = next((index for index, piece in enumerate(self._kept) if piece.fits(needed)), None)
            if index is None:
                piece = _Piece(-(-needed // PAGE) * PAGE)
                self._bytes += piece.whole.nbytes
            else:
                piece = self._kept.pop(index)
            self._kept.append(piece)
            while self._bytes > KEPT_BYTES:
                self._bytes -= self._kept.pop(0).whole.nbytes
            return piece.view(size, head)
