"""Judges stop rules by what devices say: pure. Each judgement comes with the sentence that says why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fleet_server.domain.evidence import Count
from fleet_server.domain.sequential import combined_evidence, enough, mean_log, share_evidence
from fleet_server.domain.strategy import StopMetric, StopRule


@dataclass(frozen=True)
class Outcomes:
    """How the deployments of a profile that were sent have ended so far.

    Attributes:
        settled: active or ended.
        failed: never came to serve.
        rolled_back: taken back by their device.
        sent: all of them.
        fell_back: of those that settled, how many another execution provider runs than the first wanted.
    """

    sent: int
    settled: int
    failed: int
    rolled_back: int
    fell_back: int = 0


@dataclass(frozen=True)
class Standing:
    """Where a rule stands.

    Attributes:
        rule: which.
        value: the metric over the cohort; None while nothing is known.
        samples: deployments, or blocks, that it comes from.
        devices: that had any.
        evidence: natural logarithm of the evidence against the version; 0 where the rule asks for no confidence.
        needed: natural logarithm of the evidence that stops.
        profile: that stands out; empty when none does.
        stops: whether the rule holds.
        reason: in a sentence.
    """

    rule: StopRule
    value: float | None
    samples: int
    devices: int
    evidence: float
    needed: float
    profile: str
    stops: bool
    reason: str


def judge_counted(rule: StopRule, outcomes: Mapping[str, Outcomes]) -> Standing:
    """A rule that counts deployments, by how those of each profile ended."""
    ended = {name: _bad(rule.metric, one) for name, one in outcomes.items()}
    sent = sum(one.sent for one in outcomes.values())
    settled = sum(one.settled for one in outcomes.values())
    bad = sum(ended.values())
    value = 100 * bad / sent if sent else None
    said = f"{bad} of {sent} deployments, {value or 0:.4g} %"
    if settled < rule.min_samples or value is None:
        return _standing(rule, value, settled, settled, 0.0, "", f"{said}; {rule.min_samples} are to settle first")
    if not rule.sure:
        stops = value > rule.above
        return _standing(rule, value, settled, settled, 0.0, "", said, stops=stops)
    bound = rule.above / 100
    parts = {name: share_evidence(ended[name], one.settled, bound) for name, one in outcomes.items()}
    return _weighed(rule, value, settled, settled, share_evidence(bad, settled, bound), parts, said)


def judge_sampled(rule: StopRule, counts: Mapping[str, Sequence[Count]]) -> Standing:
    """A rule that samples devices, by what those of each profile say."""
    heard = {name: [one for one in found if one.trials] for name, found in counts.items()}
    every = [one for found in heard.values() for one in found]
    trials, hits = sum(one.trials for one in every), sum(one.hits for one in every)
    if rule.metric.share:
        value = sum(one.mean * one.trials for one in every) / trials if trials else None
        said = f"{value or 0:.4g} over {trials} samples of {len(every)} devices"
        if trials < rule.min_samples:
            return _standing(rule, value, trials, len(every), 0.0, "", f"{said}; {rule.min_samples} are needed")
    else:
        value = _median([one.mean for one in every])
        said = f"{value or 0:.4g} on the device in the middle; "
        said += f"{hits} of {trials} samples of {len(every)} devices are above"
    if value is None:
        return _standing(rule, None, 0, 0, 0.0, "", "no device has enough samples yet")
    if not rule.sure:
        return _standing(rule, value, trials, len(every), 0.0, "", said, stops=value > rule.above)
    whole = combined_evidence((one.hits, one.trials, one.bound) for one in every)
    parts = {
        name: combined_evidence((one.hits, one.trials, one.bound) for one in found) for name, found in heard.items()
    }
    return _weighed(rule, value, trials, len(every), whole, parts, said)


def _weighed(
    rule: StopRule, value: float, samples: int, devices: int, whole: float, parts: Mapping[str, float], said: str
) -> Standing:
    """Half of the money is bet on the whole cohort, and half on its profiles: a version may be worse on one alone."""
    evidence = whole
    worst = ""
    if len(parts) > 1:
        evidence = mean_log([whole, mean_log(list(parts.values()))])
        name = max(parts, key=lambda one: parts[one])
        worst = name if parts[name] > whole + math.log(2) else ""
    stops = evidence >= enough(rule.sure)
    return _standing(rule, value, samples, devices, evidence, worst, said, stops=stops)


def _standing(
    rule: StopRule,
    value: float | None,
    samples: int,
    devices: int,
    evidence: float,
    profile: str,
    said: str,
    *,
    stops: bool = False,
) -> Standing:
    needed = enough(rule.sure) if rule.sure else 0.0
    against = " than on devices without it" if rule.against == "control" else ""
    reason = f"{rule.metric.value} above {rule.above:g}{against}: {said}"
    if rule.sure and value is not None:
        reason += f"; evidence {_odds(evidence)} to 1, {_odds(needed)} stop it ({100 * rule.sure:g} % sure)"
    if profile:
        reason += f"; profile {profile} stands out"
    return Standing(rule, value, samples, devices, evidence, needed, profile, stops, reason)


def _bad(metric: StopMetric, one: Outcomes) -> int:
    if metric is StopMetric.FELL_BACK_PERCENT:
        return one.fell_back
    if metric is StopMetric.INSTALL_FAILED_PERCENT:
        return one.failed
    return one.rolled_back + (one.failed if metric is StopMetric.FAILED_PERCENT else 0)


def _odds(log_evidence: float) -> str:
    return f"{math.exp(log_evidence):.3g}" if log_evidence < math.log(1e6) else "more than 1000000"


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
