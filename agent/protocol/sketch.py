"""Histograms of any numbers that both sides share: of confidences, and of what goes into a model and comes out.

All add up, over windows and devices (`agent.protocol.histogram.merge`).

A confidence has one of 32 equal bins over [0, 1]. Other numbers have logarithmic buckets of either sign: bucket `i` > 0
holds numbers in `(SMALLEST * GROWTH**(i-1), SMALLEST * GROWTH**i]`, bucket `-i` the negative ones, and 0 those that are
no larger than `SMALLEST`, so that what stands for a bucket is within 2 % of all it holds (the mapping of DDSketch,
Masson et al., VLDB 2019, with alpha = 0.02). Of a histogram with too many buckets those nearest to zero are put
together, as DDSketch collapses its lowest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from agent.protocol.histogram import GROWTH
from agent.protocol.limits import LIMITS

CONFIDENCE_BINS = 32
NO_NUMBER = -1  # among confidences: of rows whose scores are no numbers
OTHERS = -1  # among predicted classes: all that have no count of their own
SMALLEST = 1e-6
LARGEST = 1024  # the last bucket, which holds all that is larger; about 6e11
NOT_FINITE = LARGEST + 1  # the bucket of what is infinite or no number
LOG_GROWTH = math.log(GROWTH)
LOG_SMALLEST = math.log(SMALLEST)


def confidence_bin(confidence: float) -> int:
    """The bin of a confidence from 0 to 1."""
    return min(int(confidence * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)


def bucket_of(number: float) -> int:
    """The bucket of a number."""
    if not math.isfinite(number):
        return NOT_FINITE
    size = abs(number)
    if size <= SMALLEST:
        return 0
    bucket = min(math.ceil((math.log(size) - LOG_SMALLEST) / LOG_GROWTH), LARGEST)
    return bucket if number > 0 else -bucket


def bucket_value(bucket: int) -> float:
    """The number that stands for a bucket: within 2 % of all it holds; not a number for `NOT_FINITE`."""
    if bucket == 0:
        return 0.0
    if bucket == NOT_FINITE:
        return math.nan
    return math.copysign(2 * GROWTH ** abs(bucket) / (1 + GROWTH) * SMALLEST, bucket)


def bounded(buckets: Mapping[int, int], cells: int = LIMITS.sketch_cells) -> dict[int, int]:
    """A histogram of at most so many buckets: those nearest to zero are counted as the nearest that is left.

    Args:
        buckets: counts by bucket.
        cells: how many may be left, at least 3.
    """
    if len(buckets) <= cells:
        return dict(buckets)
    by_size = sorted(buckets, key=abs)
    kept = by_size[-(cells - 2) :]  # two for what is put together, one of either sign
    nearest = abs(kept[0])
    found = {bucket: buckets[bucket] for bucket in kept}
    for bucket in by_size[: -(cells - 2)]:
        place = nearest if bucket >= 0 else -nearest
        found[place] = found.get(place, 0) + buckets[bucket]
    return found


def most_common(classes: Mapping[int, int], cells: int = LIMITS.predicted_classes) -> dict[int, int]:
    """Counts of at most so many classes: the most common ones, and the rest under `OTHERS`."""
    if len(classes) <= cells:
        return dict(classes)
    by_count = sorted((one for one in classes if one != OTHERS), key=lambda one: (-classes[one], one))
    found = {one: classes[one] for one in by_count[: cells - 1]}
    found[OTHERS] = sum(classes.values()) - sum(found.values())
    return found
