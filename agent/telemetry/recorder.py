"""Counts what each loaded artifact does in a telemetry window. Thread-safe; knows no network and no disk."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from agent.protocol.histogram import bucket_of
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest
from agent.protocol.messages import ModelWindow


@dataclass
class _Counts:
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    items: int = 0
    latency: Counter[int] = field(default_factory=Counter)
    confusion: Counter[tuple[int, int]] = field(default_factory=Counter)


class Recorder:
    """The counts of one loaded artifact."""

    def __init__(self, manifest: Manifest, deployment_id: str, provider: str) -> None:
        self._manifest = manifest
        self._deployment_id = deployment_id
        self._provider = provider
        self._lock = threading.Lock()
        self._counts = _Counts()

    def answered(self, seconds: float, items: int, *, failed: bool = False) -> None:
        """One request was answered, `seconds` after it came."""
        with self._lock:
            self._counts.requests += 1
            self._counts.errors += failed
            self._counts.items += items
            self._counts.latency[bucket_of(seconds)] += 1

    def rejected(self) -> None:
        """One request was refused before the model saw it."""
        with self._lock:
            self._counts.rejected += 1

    def labelled(self, label: int, predicted: int) -> None:
        """Somebody said what one row truly was."""
        with self._lock:
            if (label, predicted) in self._counts.confusion or len(self._counts.confusion) < LIMITS.confusion_cells:
                self._counts.confusion[label, predicted] += 1

    def collect(self) -> ModelWindow:
        """The counts since the last time; new ones begin."""
        with self._lock:
            counts, self._counts = self._counts, _Counts()
        return ModelWindow(
            model=self._manifest.model,
            version=self._manifest.version,
            digest=self._manifest.digest,
            deployment_id=self._deployment_id,
            provider=self._provider,
            requests=counts.requests,
            errors=counts.errors,
            rejected=counts.rejected,
            items=counts.items,
            latency=dict(counts.latency),
            confusion=tuple((label, predicted, n) for (label, predicted), n in counts.confusion.items()),
        )
