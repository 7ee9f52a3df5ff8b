"""The latency histogram both sides share: logarithmic buckets of known relative error, that add up.

Bucket `i` holds durations in `(GROWTH**(i-1), GROWTH**i]` microseconds; a percentile read from it is within 2 % of
the true one (the mapping of DDSketch, Masson et al., VLDB 2019, with alpha = 0.02 and no collapsing: bounded instead
by `LIMITS.histogram_buckets`, which spans a microsecond to over an hour).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from agent.protocol.limits import LIMITS

ALPHA = 0.02
GROWTH = (1 + ALPHA) / (1 - ALPHA)
_LOG_GROWTH = math.log(GROWTH)


def bucket_of(seconds: float) -> int:
    """The bucket of a duration in seconds; durations below a microsecond fall in bucket 0."""
    micros = seconds * 1e6
    if micros <= 1.0:
        return 0
    return min(math.ceil(math.log(micros) / _LOG_GROWTH), LIMITS.histogram_buckets - 1)


def bucket_value(bucket: int) -> float:
    """The duration in seconds that stands for a bucket: within 2 % of all it holds."""
    if bucket <= 0:
        return 1e-6
    return 2 * GROWTH**bucket / (1 + GROWTH) * 1e-6


def percentile(buckets: Mapping[int, int], quantile: float) -> float | None:
    """The duration in seconds at `quantile` (0 to 1), or None when the histogram is empty."""
    total = sum(buckets.values())
    if total == 0:
        return None
    rank = max(1, math.ceil(quantile * total))
    seen = 0
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        if seen >= rank:
            return bucket_value(bucket)
    return bucket_value(max(buckets))


def merge(into: dict[int, int], other: Mapping[int, int]) -> None:
    """Add the counts of `other` to `into`."""
    for bucket, count in other.items():
        into[bucket] = into.get(bucket, 0) + count
