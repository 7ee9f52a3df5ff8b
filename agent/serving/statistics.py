"""What a loaded artifact did since it was loaded, as Triton's statistics extension says it. Thread-safe."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import Any

SIZES_LIMIT = 256  # different batch sizes that are told apart; the rest counts in all


class _Total:
    """How many, and how long they took together."""

    def __init__(self) -> None:
        self.count = self.nanoseconds = 0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.nanoseconds += int(seconds * 1e9)

    def said(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.nanoseconds}


class Statistics:
    """Totals of one artifact; they end with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._success, self._fail, self._queue, self._compute = _Total(), _Total(), _Total(), _Total()
        self._rows = self._executions = self._last_ms = self._run_rows = 0
        self._batches: defaultdict[int, _Total] = defaultdict(_Total)

    def answered(self, waited_s: float, took_s: float, rows: int, *, failed: bool, requests: int = 1) -> None:
        """Requests were answered: how long they had waited for their turn, and how long they took from then on.

        Args:
            waited_s: all of them together, in seconds.
            took_s: likewise.
            rows: likewise.
            failed: whether they have no answer.
            requests: how many they are.
        """
        with self._lock:
            self._last_ms = int(time.time() * 1000)
            self._queue.add(waited_s, requests)
            self._compute.add(took_s, requests)
            if failed:
                self._fail.add(waited_s + took_s, requests)
            else:
                self._success.add(waited_s + took_s, requests)
                self._rows += rows

    def ran(self, rows: int, seconds: float) -> None:
        """The model ran once."""
        with self._lock:
            self._executions += 1
            self._run_rows += rows
            if rows in self._batches or len(self._batches) < SIZES_LIMIT:
                self._batches[rows].add(seconds)

    def batches(self) -> tuple[dict[float, int], int]:
        """How often the model ran with how many rows, those that are not told apart as endless; and all rows."""
        with self._lock:
            found: dict[float, int] = {rows: total.count for rows, total in self._batches.items()}
            rest = self._executions - sum(found.values())
            return ({**found, float("inf"): rest} if rest else found), self._run_rows

    def said(self, name: str, version: str) -> dict[str, Any]:
        """A `$model_stat` object."""
        nothing = {"count": 0, "ns": 0}
        with self._lock:
            return {
                "name": name,
                "version": version,
                "last_inference": self._last_ms,
                "inference_count": self._rows,
                "execution_count": self._executions,
                "inference_stats": {
                    "success": self._success.said(),
                    "fail": self._fail.said(),
                    "queue": self._queue.said(),
                    "compute_input": nothing,
                    "compute_infer": self._compute.said(),
                    "compute_output": nothing,
                    "cache_hit": nothing,
                    "cache_miss": nothing,
                },
                "batch_stats": [
                    {
                        "batch_size": rows,
                        "compute_input": nothing,
                        "compute_infer": total.said(),
                        "compute_output": nothing,
                    }
                    for rows, total in sorted(self._batches.items())
                ],
            }
