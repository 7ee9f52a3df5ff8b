"""How far two histograms are apart: pure. Both distances are corrected for what small samples differ by chance.

Histograms are counts by bucket, of `agent.protocol.sketch`; they need not have the same total.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from agent.protocol.sketch import CONFIDENCE_BINS, NO_NUMBER

Histogram = Mapping[int, int]
GROUPS = 10
_HALF = 0.5


def ks_distance(before: Histogram, now: Histogram) -> float | None:
    """The largest difference of the two distribution functions, 0 to 1; None where one is empty.

    Less what two samples of one distribution differ by in half of the cases: the two-sample form of the bound of
    Dvoretzky, Kiefer and Wolfowitz with Massart's constant (Annals of Probability 18, 1990). Buckets have an order.
    """
    first, second = sum(before.values()), sum(now.values())
    if not first or not second:
        return None
    largest = left = right = 0.0
    for bucket in sorted({*before, *now}):
        left += before.get(bucket, 0) / first
        right += now.get(bucket, 0) / second
        largest = max(largest, abs(left - right))
    chance = math.sqrt(math.log(2 / _HALF) / 2 * (1 / first + 1 / second))
    return max(largest - chance, 0.0)


def psi(before: Histogram, now: Histogram, *, ordered: bool) -> float | None:
    """The population stability index, 0 and more; None where one is empty.

    Less what is expected of it between two samples of one distribution: about the number of groups less one, times the
    sum of the inverse sample sizes (Yurdakul, Statistical properties of population stability index, 2018).

    Args:
        before: the reference.
        now: what is compared with it.
        ordered: whether buckets have an order: then they are put together into tenths of the reference; else each is a
            group.
    """
    first, second = sum(before.values()), sum(now.values())
    if not first or not second:
        return None
    groups = _tenths(before, now) if ordered else [(before.get(one, 0), now.get(one, 0)) for one in {*before, *now}]
    total = 0.0
    for old, new in groups:
        was, is_now = (old + _HALF) / (first + _HALF * len(groups)), (new + _HALF) / (second + _HALF * len(groups))
        total += (is_now - was) * math.log(is_now / was)
    return max(total - (len(groups) - 1) * (1 / first + 1 / second), 0.0)


def mean_confidence(bins: Histogram) -> float | None:
    """The mean of confidences, 0 to 1; None where there is none."""
    counted = {one: count for one, count in bins.items() if one != NO_NUMBER}
    total = sum(counted.values())
    return sum((one + _HALF) / CONFIDENCE_BINS * count for one, count in counted.items()) / total if total else None


def _tenths(before: Histogram, now: Histogram) -> Sequence[tuple[int, int]]:
    """Counts of both in groups that each hold about a tenth of the reference; the ends take what is beyond."""
    total = sum(before.values())
    groups: list[tuple[int, int]] = []
    old = new = seen = 0
    for bucket in sorted({*before, *now}):
        old, new = old + before.get(bucket, 0), new + now.get(bucket, 0)
        seen += before.get(bucket, 0)
        if seen * GROUPS >= total * (len(groups) + 1) and len(groups) < GROUPS - 1:
            groups.append((old, new))
            old = new = 0
    groups.append((old, new))
    return groups
