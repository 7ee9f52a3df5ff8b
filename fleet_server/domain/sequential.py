"""Tests that may be looked at as often as one likes: evidence as a bet whose money can't be expected to grow.

An e-process starts at 1 and, while the hypothesis holds, is expected never to be more than it was. So the chance that
it ever reaches `1 / (1 - confidence)` is at most `1 - confidence`, whenever and however often one looks (Ville, Etude
critique de la notion de collectif, 1939). The bets are likelihood ratios mixed over alternatives (Robbins, Statistical
methods related to the law of the iterated logarithm, Annals of Mathematical Statistics 41, 1970; Howard, Ramdas,
McAuliffe and Sekhon, Time-uniform, nonparametric, nonasymptotic confidence sequences, Annals of Statistics 49, 2021).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

_ODDS = (1.5, 3.0, 9.0, 30.0, 300.0)  # of the alternatives, as multiples of the hypothesis's own
_SHARES = (0.03, 0.1, 0.3, 1.0)  # of the devices that a bad version may hit
_MOST = 1000.0  # what one device may say: of many, no single one decides
_LITTLE = 5.0  # the same, where all are thought to be alike
_FEW = 3  # of so few devices, one may


def share_evidence(hits: int, trials: int, bound: float) -> float:
    """Evidence, as its natural logarithm, that more than a share `bound` of trials hit.

    Valid when each trial hits with a chance of at most `bound` whatever came before, under the hypothesis.

    Args:
        hits: trials that did.
        trials: all of them.
        bound: between 0 and 1, both excluded.

    Raises:
        ValueError: when `bound` is not between 0 and 1, or there are more hits than trials.
    """
    if not 0 < bound < 1:
        raise ValueError(f"bound: {bound} is not between 0 and 1")
    if not 0 <= hits <= trials:
        raise ValueError(f"hits: {hits} of {trials}")
    return mean_log([_ratio(hits, trials, bound, odds) for odds in _ODDS])


def combined_evidence(devices: Iterable[tuple[int, int, float]]) -> float:
    """Evidence of independent devices together, as its natural logarithm, that the version is worse on some or all.

    Half is bet on a share of the devices being worse, by whatever: a bet on a share e turns each device's evidence E
    into `1 - e + e E`. Half is bet on all of them being a little worse by the same. Products over devices are
    e-processes again, and so are means. What one device says counts up to a limit, unless there are few.

    Args:
        devices: each one's hits, trials and bound, as of `share_evidence`.
    """
    found = list(devices)
    if not found:
        return 0.0
    many = len(found) > _FEW
    sums = [sum(column) for column in zip(*(_bets(*one, many=many) for one in found), strict=True)]
    return mean_log([mean_log(sums[: len(_SHARES)]), mean_log(sums[len(_SHARES) :])])


@functools.lru_cache(maxsize=1 << 17)
def _bets(hits: int, trials: int, bound: float, *, many: bool) -> tuple[float, ...]:
    """What each bet of `combined_evidence` makes of a device. Kept: most say what they said the last time."""
    most, little = (math.log(_MOST), math.log(_LITTLE)) if many else (math.inf, math.inf)
    alone = min(share_evidence(hits, trials, bound), most)
    some = (_tempered(alone, share) for share in _SHARES)
    return *some, *(min(_ratio(hits, trials, bound, odds), little) for odds in _ODDS)


def enough(confidence: float) -> float:
    """The natural logarithm of the evidence that a confidence asks for.

    Raises:
        ValueError: when it is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1")
    return -math.log(1 - confidence)


def _ratio(hits: int, trials: int, bound: float, odds: float) -> float:
    """The logarithm of how much likelier so many hits are when the odds of one are so many times those of the bound."""
    ratio = odds * bound / (1 - bound)
    share = ratio / (1 + ratio)
    return hits * math.log(share / bound) + (trials - hits) * math.log((1 - share) / (1 - bound))


def _tempered(log_evidence: float, share: float) -> float:
    """The logarithm of `1 - share + share * exp(log_evidence)`, without overflow."""
    if share >= 1:
        return log_evidence
    high = max(log_evidence, 0.0)
    return high + math.log((1 - share) * math.exp(-high) + share * math.exp(log_evidence - high))


def mean_log(logs: Sequence[float]) -> float:
    """The logarithm of the mean of what these are the logarithms of: of e-processes, an e-process again."""
    high = max(logs)
    return high + math.log(sum(math.exp(one - high) for one in logs) / len(logs))
