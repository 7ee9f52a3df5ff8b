"""Evidence that may be looked at at any time: how often it is wrong, and what it finds."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_server.domain.sequential import combined_evidence, enough, mean_log, share_evidence


@pytest.mark.parametrize(("hits", "trials", "bound"), [(1, 0, 0.5), (-1, 2, 0.5), (1, 2, 0.0), (1, 2, 1.0)])
def test_what_is_no_share_is_refused(hits: int, trials: int, bound: float) -> None:
    with pytest.raises(ValueError, match=r"hits|bound"):
        share_evidence(hits, trials, bound)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0])
def test_a_confidence_is_between_none_and_certainty(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        enough(confidence)


@given(st.floats(0.001, 0.9), st.integers(1, 12))
def test_a_bet_is_expected_to_win_nothing_while_the_hypothesis_holds(bound: float, trials: int) -> None:
    chances = [math.comb(trials, hits) * bound**hits * (1 - bound) ** (trials - hits) for hits in range(trials + 1)]
    expected = sum(chance * math.exp(share_evidence(hits, trials, bound)) for hits, chance in enumerate(chances))
    assert expected == pytest.approx(1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.floats(0.01, 0.9)), min_size=1, max_size=5))
def test_devices_together_are_expected_to_win_nothing_either(devices: list[tuple[int, float]]) -> None:
    """Of each device every number of hits is gone through, with its chance."""
    expected = 0.0
    for hits in itertools.product(*(range(trials + 1) for trials, _ in devices)):
        chance = math.prod(
            math.comb(trials, count) * bound**count * (1 - bound) ** (trials - count)
            for count, (trials, bound) in zip(hits, devices, strict=True)
        )
        said = [(count, trials, bound) for count, (trials, bound) in zip(hits, devices, strict=True)]
        expected += chance * math.exp(combined_evidence(said))
    assert expected <= 1 + 1e-9


def test_peeking_raises_no_false_alarm() -> None:
    """Twenty devices on the edge of the hypothesis, looked at after every one of 40 rounds."""
    wrong = 0
    for seed in range(300):
        chance = random.Random(seed)
        hits = [0] * 20
        for round_number in range(1, 41):
            hits = [count + (chance.random() < 0.5) for count in hits]
            if combined_evidence([(one, round_number, 0.5) for one in hits]) >= enough(0.95):
                wrong += 1
                break
    assert wrong <= 15 + 12, "5 % and three standard deviations"


@pytest.mark.parametrize(
    ("hits", "trials", "bound", "sure"),
    [(1, 20, 0.005, False), (2, 20, 0.005, True), (3, 24, 0.01, True), (3, 24, 0.05, False), (0, 500, 0.01, False)],
)
def test_how_much_it_takes(hits: int, trials: int, bound: float, sure: bool) -> None:
    assert (share_evidence(hits, trials, bound) >= enough(0.95)) is sure


def test_one_device_of_many_decides_nothing_and_a_few_do() -> None:
    good, bad = (0, 10, 0.5), (1000, 1000, 0.5)
    assert combined_evidence([bad] + [good] * 19) < enough(0.95)
    assert combined_evidence([bad] * 2 + [good] * 18) >= enough(0.95)
    assert combined_evidence([bad]) >= enough(0.99), "a fleet of one has no other"


def test_a_slight_worsening_of_all_is_found() -> None:
    assert combined_evidence([(3, 4, 0.5)] * 20) >= enough(0.95)
    assert combined_evidence([]) == 0.0


@given(st.lists(st.floats(-700, 700), min_size=1, max_size=5))
def test_means_of_logarithms_do_not_overflow(logs: list[float]) -> None:
    assert min(logs) - 1e-9 <= mean_log(logs) <= max(logs) + 1e-9
