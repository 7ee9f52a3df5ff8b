"""How long batches take, by their size: so that none is made that takes longer than a request ought to. Pure."""

from __future__ import annotations

WEIGHT = 0.2  # of the newest measurement
HOPE = 0.01  # by which a larger batch's rows are taken to be faster, whenever a smaller one was measured that is


class BatchTimes:
    """What was measured, by powers of two of the rows.

    What was not is reckoned from the next smaller size, as long as that by the row: a batch of a size that was never
    tried is only made where there is time for it. What was slow once is tried again later.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # a row's, by the bit length of the batch's rows

    def measured(self, rows: int, seconds: float) -> None:
        """A batch took so long."""
        size = rows.bit_length()
        before = self._seconds.get(size)
        each = seconds / rows
        known = self._seconds[size] = each if before is None else before + WEIGHT * (each - before)
        for larger, slow in self._seconds.items():
            if larger > size and slow > known:
                self._seconds[larger] = slow + HOPE * (known - slow)

    def seconds(self, rows: int) -> float | None:
        """How long a batch will take; None where nothing was measured yet."""
        known = [size for size in self._seconds if size <= rows.bit_length()]
        size = max(known) if known else min(self._seconds, default=None)
        return None if size is None else self._seconds[size] * rows

    def most(self, limit: int, budget_s: float) -> int:
        """How many rows a batch may have that takes no longer than the budget, at most `limit`, at least one.

        Where nothing was measured it is one row: that is how measuring begins.
        """
        rows = 1
        while rows < limit:
            more = min(2 * rows, limit)
            seconds = self.seconds(more)
            if seconds is None or seconds > budget_s:
                break
            rows = more
        return rows
