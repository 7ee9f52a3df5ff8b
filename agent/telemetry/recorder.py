"""Counts what each loaded artifact does: in a telemetry window, since it was loaded, and lately. Thread-safe.

It knows no network and no disk.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from agent.protocol.histogram import bucket_of
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest
from agent.protocol.messages import ModelWindow
from agent.runtimes.base import Tensors
from agent.serving.ipc import Counts
from agent.telemetry.sketches import Sketches

RECENT = 512  # requests after which the older half of what counts as recent is forgotten


@dataclass
class _Counts:
    requests: int = 0
    errors: int = 0
    rejected: int = 0
    items: int = 0
    latency: Counter[int] = field(default_factory=Counter)
    confusion: Counter[tuple[int, int]] = field(default_factory=Counter)
    shadowed: int = 0
    compared: int = 0
    disagreed: int = 0
    dropped: int = 0


class Recorder:
    """The counts of one loaded artifact."""

    def __init__(self, manifest: Manifest, deployment_id: str, provider: str) -> None:
        self._manifest = manifest
        self._deployment_id = deployment_id
        self._provider = provider
        self._lock = threading.Lock()
        self._sketches = Sketches(manifest)
        self._counts = _Counts()
        self._before = _Counts()  # of windows that are over
        self._recent: Counter[int] = Counter()
        self._less_recent: Counter[int] = Counter()
        self._recently = 0

    def answered(self, seconds: Sequence[float], items: int, *, failed: bool = False) -> None:
        """Requests were answered, each so many seconds after it came, which had so many items together."""
        buckets = [bucket_of(one) for one in seconds]
        with self._lock:
            counts, latency, recent = self._counts, self._counts.latency, self._recent
            counts.requests += len(buckets)
            counts.errors += len(buckets) if failed else 0
            counts.items += items
            for bucket in buckets:
                latency[bucket] += 1
                recent[bucket] += 1
            self._recently += len(buckets)
            if self._recently >= RECENT:
                self._less_recent, self._recent, self._recently = self._recent, Counter(), 0

    def observed(self, inputs: Tensors, outputs: Tensors, rows: int, now: float) -> None:
        """Rows were answered, at a time of a clock that is never set: a sample of them is sketched."""
        self._sketches.observe(inputs, outputs, rows, now)

    def rejected(self) -> None:
        """One request was refused before the model saw it."""
        with self._lock:
            self._counts.rejected += 1

    def shadowed(self) -> None:
        """One of the requests that were answered was a copy: nobody waited for it."""
        with self._lock:
            self._counts.shadowed += 1

    def compared(self, rows: int, disagreed: int) -> None:
        """Rows of a copy were compared with what was served."""
        with self._lock:
            self._counts.compared += rows
            self._counts.disagreed += disagreed

    def dropped(self) -> None:
        """A request ought to have been copied, and was not."""
        with self._lock:
            self._counts.dropped += 1

    def labelled(self, label: int, predicted: int) -> None:
        """Somebody said what one row truly was."""
        with self._lock:
            if (label, predicted) in self._counts.confusion or len(self._counts.confusion) < LIMITS.confusion_cells:
                self._counts.confusion[label, predicted] += 1

    def collect(self) -> ModelWindow:
        """The counts since the last time; new ones begin."""
        sketched = self._sketches.collect()
        with self._lock:
            counts, self._counts = self._counts, _Counts()
            self._before.requests += counts.requests
            self._before.errors += counts.errors
            self._before.rejected += counts.rejected
            self._before.latency.update(counts.latency)
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
            shadowed=counts.shadowed,
            compared=counts.compared,
            disagreed=counts.disagreed,
            dropped=counts.dropped,
            confidence=sketched.confidence,
            predicted=sketched.predicted,
            inputs=sketched.inputs,
            outputs=sketched.outputs,
        )

    def totals(self, oldest_s: float, running_s: float) -> Counts:
        """The counts since the artifact was loaded; windows stay as they are.

        Args:
            oldest_s: how long the request has waited that has waited longest, in seconds.
            running_s: how long the inference has been going on that goes on now, in seconds.
        """
        with self._lock:
            return Counts(
                deployment_id=self._deployment_id,
                requests=self._before.requests + self._counts.requests,
                errors=self._before.errors + self._counts.errors,
                rejected=self._before.rejected + self._counts.rejected,
                latency=dict(self._before.latency + self._counts.latency),
                recent=dict(self._recent + self._less_recent),
                oldest_s=oldest_s,
                running_s=running_s,
            )
