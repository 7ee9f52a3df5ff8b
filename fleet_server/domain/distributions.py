"""Two histograms of one thing side by side, in few bins that people and programs can read: pure.

Histograms are counts by bucket, of `agent.protocol.sketch`. Bins are for looking at: distances are taken of the
buckets themselves (`fleet_server.domain.drift`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent.protocol.histogram import GROWTH
from agent.protocol.sketch import CONFIDENCE_BINS, NO_NUMBER, NOT_FINITE, OTHERS, SMALLEST, bucket_value
from fleet_server.domain.drift import Histogram, ks_distance, psi

BINS = 20  # of numbers
CLASSES = 20  # that have a bin of their own
TAIL = 0.005  # of either histogram that lies beyond the first and the last edge, at each end
FINEST = GROWTH - 1  # width of a bucket, as a share of what it holds
_PLAIN = 0.9  # of the most that bins could tell apart: for so much, bins are equally wide
CONFIDENCE, PREDICTED, INPUT, OUTPUT = "confidence", "predicted", "input", "output"


@dataclass(frozen=True)
class Bin:
    """What lies from `low` to `high`, in both.

    Attributes:
        label: as people call it.
        low: the lower edge; None where there is none, and of what is no number.
        high: the upper edge, likewise.
        before: count of the reference.
        now: count of what is compared with it.
    """

    label: str
    low: float | None
    high: float | None
    before: int
    now: int


@dataclass(frozen=True)
class Name:
    """What a histogram of `fleet_server.domain.evidence.Sample.shapes` is of, from its name.

    Attributes:
        kind: `confidence`, `predicted`, `input` or `output`.
        tensor: its name; None of the first two.
        part: `mean` or `deviation` of the tensor's rows; None of the first two.
    """

    kind: str
    tensor: str | None = None
    part: str | None = None

    @classmethod
    def of(cls, text: str) -> Name:
        """Read one; a tensor's name may hold a colon too."""
        kind, _, rest = text.partition(":")
        if not rest:
            return cls(kind)
        tensor, _, part = rest.rpartition(":")
        return cls(kind, tensor, part)

    @property
    def measure(self) -> str:
        """By what its histograms are compared: `psi` or `ks`."""
        return "ks" if self.kind == CONFIDENCE else "psi"

    def distance(self, before: Histogram, now: Histogram) -> float | None:
        """How far they are apart, as stop rules and alerts have it; None where one is empty."""
        if self.kind == CONFIDENCE:
            return ks_distance(before, now)
        return psi(before, now, ordered=self.kind != PREDICTED)

    def bins(self, before: Histogram, now: Histogram, labels: Sequence[str] = ()) -> list[Bin]:
        """Both in bins; `labels` are names of classes."""
        if self.kind == CONFIDENCE:
            return confidence_bins(before, now)
        return class_bins(before, now, labels) if self.kind == PREDICTED else number_bins(before, now)


def confidence_bins(before: Histogram, now: Histogram) -> list[Bin]:
    """All of them from 0 to 1, and what was no number where there was such."""
    found = [
        Bin(_between(low, high), low, high, before.get(one, 0), now.get(one, 0))
        for one in range(CONFIDENCE_BINS)
        for low, high in [(one / CONFIDENCE_BINS, (one + 1) / CONFIDENCE_BINS)]
    ]
    return [*found, *_no_number(NO_NUMBER, before, now)]


def class_bins(before: Histogram, now: Histogram, labels: Sequence[str] = ()) -> list[Bin]:
    """The classes that are most frequent in either, by their number, and all others together."""
    first, second = sum(before.values()) or 1, sum(now.values()) or 1

    def weight(one: int) -> float:
        return max(before.get(one, 0) / first, now.get(one, 0) / second)

    known = sorted({*before, *now} - {OTHERS}, key=lambda one: (-weight(one), one))
    own = known if len(known) <= CLASSES else known[: CLASSES - 1]
    rest = {OTHERS, *known} - {*own}
    found = [
        Bin(labels[one] if 0 <= one < len(labels) else str(one), None, None, before.get(one, 0), now.get(one, 0))
        for one in sorted(own)
    ]
    old, new = (sum(side.get(one, 0) for one in rest) for side in (before, now))
    return [*found, Bin("others", None, None, old, new)] if old or new else found


def number_bins(before: Histogram, now: Histogram) -> list[Bin]:
    """At most so many bins over what lies between the tails, and what was no number where there was such.

    They are equally wide, unless these would throw most of what there is together: then they hold equally many buckets,
    so that their edges grow by a factor. What is beyond the edges counts in the first and the last bin.
    """
    buckets = sorted({*before, *now} - {NOT_FINITE})
    if not buckets:
        return _no_number(NOT_FINITE, before, now)
    ends = [_ends(side) for side in (before, now) if any(one != NOT_FINITE for one in side)]
    first, last = min(low for low, _ in ends), max(high for _, high in ends)
    choices = [_by_buckets(first, last), *_equally_wide(first, last)]
    ranked = [_fill(edges, place, buckets, before, now) for edges, place in choices]
    best = max(_told_apart(bins) for bins in ranked)
    chosen = next(bins for bins in reversed(ranked) if _told_apart(bins) >= _PLAIN * best)
    return [*chosen, *_no_number(NOT_FINITE, before, now)]


def bounds(bucket: int) -> tuple[float, float]:
    """The edges of a bucket of numbers that are finite."""
    if bucket == 0:
        return -SMALLEST, SMALLEST
    low, high = SMALLEST * GROWTH ** (abs(bucket) - 1), SMALLEST * GROWTH ** abs(bucket)
    return (low, high) if bucket > 0 else (-high, -low)


Place = Callable[[int], int]
_Choice = tuple[list[float], Place]


def _by_buckets(first: int, last: int) -> _Choice:
    """Edges of bins of equally many buckets, and which bin a bucket is in."""
    width = math.ceil((last - first + 1) / BINS)
    edges = [bounds(one)[0] for one in range(first, last + 1, width)] + [bounds(last)[1]]
    return edges, lambda bucket: (bucket - first) // width


def _equally_wide(first: int, last: int) -> list[_Choice]:
    """The same of bins of equal width; none where buckets are too coarse for it."""
    low, high = bounds(first)[0], bounds(last)[1]
    coarsest = max(FINEST * max(abs(low), abs(high)), 2 * SMALLEST if first <= 0 <= last else 0.0)
    count = min(BINS, int((high - low) / coarsest))
    if count < 2:
        return []
    edges = [low + (high - low) * one / count for one in range(count + 1)]
    return [(edges, lambda bucket: math.floor((bucket_value(bucket) - low) / (high - low) * count))]


def _fill(edges: Sequence[float], place: Place, buckets: Sequence[int], before: Histogram, now: Histogram) -> list[Bin]:
    count = len(edges) - 1
    old, new = [0] * count, [0] * count
    below = above = False
    for bucket in buckets:
        at = place(bucket)
        below, above = below or at < 0, above or at >= count
        at = min(max(at, 0), count - 1)
        old[at] += before.get(bucket, 0)
        new[at] += now.get(bucket, 0)
    found = []
    for one in range(count):
        low = None if one == 0 and below else edges[one]
        high = None if one == count - 1 and above else edges[one + 1]
        found.append(Bin(_between(low, high), low, high, old[one], new[one]))
    return found


def _told_apart(bins: Sequence[Bin]) -> float:
    """The entropy of both together, each weighing as much: how much the bins tell."""
    first, second = sum(one.before for one in bins) or 1, sum(one.now for one in bins) or 1
    shares = [one.before / first / 2 + one.now / second / 2 for one in bins]
    return -sum(one * math.log(one) for one in shares if one)


def _ends(side: Histogram) -> tuple[int, int]:
    """The first and last bucket but for the tails."""
    finite = sorted((bucket, count) for bucket, count in side.items() if bucket != NOT_FINITE)
    total = sum(count for _, count in finite)
    low = high = finite[0][0]
    seen = 0
    for bucket, count in finite:
        if seen <= TAIL * total:
            low = bucket
        if seen < (1 - TAIL) * total:
            high = bucket
        seen += count
    return low, high


def _between(low: float | None, high: float | None) -> str:
    if low is None:
        return "all" if high is None else f"up to {high:.3g}"
    return f"{low:.3g} and more" if high is None else f"{low:.3g} to {high:.3g}"


def _no_number(bucket: int, before: Histogram, now: Histogram) -> list[Bin]:
    old, new = before.get(bucket, 0), now.get(bucket, 0)
    return [Bin("no number", None, None, old, new)] if old or new else []
