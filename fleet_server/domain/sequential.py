"""Tests that may be looked at as often as one likes: evidence as a bet whose money can't be expected to grow.

An e-process starts at 1 and, while the hypothesis holds, is expected never to be more than it was. So the chance that
it ever reaches `1 / (1 - confidence)` is at most `1 - confidence`, whenever and however often one looks (Ville, Etude
critique de la notion de collectif, 1939). The bets are likelihood ratios mixed over alternatives (Robbins, Statistical
methods related to the law of the iterated logarithm, Annals of Mathematical Statistics 41, 1970; Howard, Ramdas,
McAuliffe and Sekhon, Time-uniform, nonparametric, nonasymptotic confidence sequences, Annals of Statistics 49, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

_ODDS = (1.5, 3.0, 9.0, 30.0, 300.0)  # of the alternatives, as multiples of the hypothesis's own
_SHARES = (0.03, 0.1, 0.3, 1.0)  # of the devices that a bad version may hit
_MOST = 1000.0  # what one device may say: of many, no single one decides
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
    return mean_log(
        [
            hits * math.log(share / bound) + (trials - hits) * math.log((1 - share) / (1 - bound))
            for share in (_share(odds * bound / (1 - bound)) for odds in _ODDS)
        ]
    )


def combined_evidence(devices: Iterable[float]) -> float:
    """Evidence of independent devices together, as its natural logarithm, that some share of them is worse.

    A bet on a share e of the devices turns each device's evidence E into `1 - e + e E`; the product of those is an
    e-process again, and so is the mean over shares. What one device says counts up to a limit, unless there are few.

    Args:
        devices: the natural logarithm of each device's evidence.
    """
    logs = list(devices)
    if not logs:
        return 0.0
    most = math.log(_MOST) if len(logs) > _FEW else math.inf
    return mean_log([sum(_tempered(min(one, most), share) for one in logs) for share in _SHARES])


def enough(confidence: float) -> float:
    """The natural logarithm of the evidence that a confidence asks for.

    Raises:
        ValueError: when it is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1")
    return -math.log(1 - confidence)


def _share(odds: float) -> float:
    return odds / (1 + odds)


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
