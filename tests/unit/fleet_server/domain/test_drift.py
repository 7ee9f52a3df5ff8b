"""How far histograms are apart, and what of it is chance."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol.sketch import NO_NUMBER, bucket_of, confidence_bin
from fleet_server.domain.drift import ks_distance, mean_confidence, psi
from fleet_server.domain.evidence import Sample, Tally, fold
from fleet_server.domain.rules import judge_sampled
from fleet_server.domain.strategy import StopMetric, StopRule

HISTOGRAMS = st.dictionaries(st.integers(-50, 50), st.integers(1, 500), min_size=1, max_size=20)


def normal(mean: float, count: int, seed: int, deviation: float = 1.0) -> Counter[int]:
    chance = random.Random(seed)
    return Counter(bucket_of(chance.gauss(mean, deviation)) for _ in range(count))


def confidences(mean: float, count: int, seed: int) -> Counter[int]:
    chance = random.Random(seed)
    return Counter(confidence_bin(min(max(chance.gauss(mean, 0.1), 0), 1)) for _ in range(count))


def test_by_hand() -> None:
    assert ks_distance({0: 1000}, {1: 1000}) == pytest.approx(1, abs=0.05)
    assert ks_distance({0: 500, 1: 500}, {0: 800, 1: 200}) == pytest.approx(0.3, abs=0.05)
    before, now = {0: 5000, 1: 5000}, {0: 8000, 1: 2000}
    assert psi(before, now, ordered=False) == pytest.approx(0.3 * 0.4700036 + 0.3 * 0.9162907, abs=0.001)
    assert mean_confidence({0: 1, 31: 1, NO_NUMBER: 5}) == pytest.approx(0.5)


@given(HISTOGRAMS)
def test_a_histogram_is_not_far_from_itself(histogram: dict[int, int]) -> None:
    assert ks_distance(histogram, histogram) == 0
    assert psi(histogram, histogram, ordered=True) == 0
    assert psi(histogram, histogram, ordered=False) == 0


@given(HISTOGRAMS, HISTOGRAMS)
def test_distances_are_bounded(before: dict[int, int], now: dict[int, int]) -> None:
    distance = ks_distance(before, now)
    assert distance is not None
    assert 0 <= distance <= 1
    assert (psi(before, now, ordered=True) or 0) >= 0


def test_nothing_is_far_from_nothing() -> None:
    assert ks_distance({}, {1: 1}) is None
    assert psi({1: 1}, {}, ordered=True) is None
    assert mean_confidence({NO_NUMBER: 3}) is None


def test_small_samples_of_the_same_are_near_and_shifted_ones_far() -> None:
    same = [psi(normal(0, 300, seed), normal(0, 60, 1000 + seed), ordered=True) or 0 for seed in range(50)]
    assert sum(one > 0.1 for one in same) <= 10
    shifted = [psi(normal(0, 300, seed), normal(1.0, 60, 1000 + seed), ordered=True) or 0 for seed in range(50)]
    assert min(shifted) > 0.25
    apart = [ks_distance(normal(0, 300, seed), normal(0, 60, 1000 + seed)) or 0 for seed in range(50)]
    assert sum(one > 0 for one in apart) <= 30, "half of them, by chance"


@pytest.mark.parametrize(
    ("metric", "above"), [(StopMetric.CONFIDENCE_DROP_POINTS, 8), (StopMetric.CONFIDENCE_SHIFT, 0.2)]
)
def test_a_less_confident_version_is_found(metric: StopMetric, above: float) -> None:
    rule = StopRule(metric=metric, above=above, min_samples=50)

    def judged(mean: float) -> bool:
        tallies = []
        for device in range(20):
            before = Sample(requests=300, shapes={"confidence": confidences(0.9, 300, device)})
            windows = [
                Sample(requests=50, shapes={"confidence": confidences(mean, 50, 100 * device + number)})
                for number in range(10)
            ]
            tallies.append(fold(rule, Tally(), windows, before=before))
        return judge_sampled(rule, {"p": tallies}).stops

    assert judged(0.7)
    assert not judged(0.9)


def test_drift_of_classes_numbers_and_inputs() -> None:
    def found(metric: StopMetric, before: Sample, now: Sample) -> float:
        rule = StopRule(metric=metric, above=0.25, min_samples=50)
        return fold(rule, Tally(), [now], before=before).mean

    old = Sample(requests=400, shapes={"predicted": {0: 200, 1: 200}, "input:x:mean": normal(0, 400, 1)})
    new = Sample(requests=50, shapes={"predicted": {0: 48, 1: 2}, "input:x:mean": normal(3, 50, 2)})
    same = Sample(requests=50, shapes={"predicted": {0: 26, 1: 24}, "input:x:mean": normal(0, 50, 2)})
    for metric in (StopMetric.OUTPUT_DRIFT, StopMetric.INPUT_DRIFT):
        assert found(metric, old, new) > 0.5
        assert found(metric, old, same) < 0.15
    numbers = Sample(requests=400, shapes={"output:y:mean": normal(0, 400, 1)})
    assert found(StopMetric.OUTPUT_DRIFT, numbers, Sample(requests=50, shapes={"output:y:mean": normal(5, 50, 3)})) > 1
    assert found(StopMetric.INPUT_DRIFT, numbers, numbers) == 0, "it says nothing of inputs"


def test_crashes_are_counted_by_windows() -> None:
    rule = StopRule(metric=StopMetric.CRASHED_WINDOWS_PERCENT, above=1, min_samples=10)
    bad = fold(rule, Tally(), [Sample(requests=5, windows=1, crashed=number < 3) for number in range(20)], before=None)
    assert (bad.hits, bad.trials, bad.mean) == (3, 20, 15)
    assert judge_sampled(rule, {"p": [bad] * 3}).stops
