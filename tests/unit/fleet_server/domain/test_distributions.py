"""Histograms side by side, in bins: nothing is lost, and what people see is what there is."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol.sketch import LARGEST, NO_NUMBER, NOT_FINITE, OTHERS, bucket_of, confidence_bin
from fleet_server.domain.distributions import BINS, CLASSES, Name, bounds, class_bins, confidence_bins, number_bins
from fleet_server.domain.drift import ks_distance, psi

BUCKETS = st.one_of(st.integers(-LARGEST, LARGEST), st.integers(300, 360), st.just(NOT_FINITE))
NUMBERS = st.dictionaries(BUCKETS, st.integers(1, 500), max_size=60)


def sketch(numbers: list[float]) -> Counter[int]:
    return Counter(map(bucket_of, numbers))


@given(NUMBERS, NUMBERS)
def test_every_number_is_in_one_bin_and_bins_lie_in_a_row(before: dict[int, int], now: dict[int, int]) -> None:
    bins = number_bins(before, now)
    assert sum(one.before for one in bins) == sum(before.values())
    assert sum(one.now for one in bins) == sum(now.values())
    finite = [one for one in bins if one.label != "no number"]
    assert len(finite) <= BINS
    edges = [(one.low, one.high) for one in finite]
    for (_, high), (low, _) in itertools.pairwise(edges):
        assert high == low
        assert high is not None
        assert math.isfinite(high)
    assert len({one.label for one in bins}) == len(bins) or len(finite) > 2


@given(st.integers(-LARGEST, LARGEST))
def test_edges_of_a_bucket_hold_what_stands_for_it(bucket: int) -> None:
    low, high = bounds(bucket)
    assert low < high
    middle = (low + high) / 2
    assert bucket_of(middle) == bucket


def test_numbers_of_one_size_get_bins_of_one_width_and_open_ends() -> None:
    chance = random.Random(1)
    bins = number_bins(
        sketch([chance.gauss(0, 1) for _ in range(4000)]), sketch([chance.gauss(1, 1) for _ in range(4000)])
    )
    assert len(bins) == BINS
    assert bins[0].low is None
    assert bins[-1].high is None
    widths = [one.high - one.low for one in bins[1:-1] if one.high is not None and one.low is not None]
    assert max(widths) == pytest.approx(min(widths))
    assert max(bins, key=lambda one: one.before).low == pytest.approx(0, abs=0.5)
    assert max(bins, key=lambda one: one.now).low == pytest.approx(1, abs=0.5)


def test_numbers_of_many_sizes_get_bins_that_grow_by_a_factor() -> None:
    chance = random.Random(1)
    bins = number_bins(sketch([math.exp(chance.gauss(0, 3)) for _ in range(4000)]), sketch([]))
    edges = [(one.low, one.high) for one in bins[1:-2]]
    factors = [high / low for low, high in edges if low and high]
    assert len(factors) > BINS / 2
    assert max(factors) == pytest.approx(min(factors))
    assert max(one.before for one in bins) < 1000


def test_one_value_is_one_bin() -> None:
    (only,) = number_bins({bucket_of(0.5): 7}, {bucket_of(0.5): 3})
    assert (only.before, only.now) == (7, 3)
    assert only.low is not None
    assert only.high is not None
    assert only.low < 0.5 <= only.high
    (zero,) = number_bins({}, {0: 1})
    assert (zero.low, zero.high) == (-1e-6, 1e-6)
    assert number_bins({}, {}) == []
    assert [one.label for one in number_bins({NOT_FINITE: 1}, {})] == ["no number"]


def test_confidences_have_bins_from_0_to_1() -> None:
    bins = confidence_bins({confidence_bin(0.99): 3, NO_NUMBER: 1}, {confidence_bin(0.0): 2})
    assert (bins[0].low, bins[0].now) == (0.0, 2)
    assert (bins[-2].high, bins[-2].before) == (1.0, 3)
    assert (bins[-1].label, bins[-1].before) == ("no number", 1)
    assert len(confidence_bins({0: 1}, {0: 1})) == 32


def test_classes_have_their_names_and_rare_ones_are_put_together() -> None:
    bins = class_bins({0: 5, 1: 1}, {1: 4, 7: 2, OTHERS: 1}, ["cat", "dog"])
    assert [(one.label, one.before, one.now) for one in bins] == [
        ("cat", 5, 0), ("dog", 1, 4), ("7", 0, 2), ("others", 0, 1),
    ]  # fmt: skip
    many = class_bins({one: 100 - one for one in range(50)}, {49: 1000})
    assert len(many) == CLASSES
    assert {"49", "0", "others"} <= {one.label for one in many}
    assert "48" not in {one.label for one in many}
    assert sum(one.before for one in many) == sum(100 - one for one in range(50))


def test_names_say_what_is_measured_how() -> None:
    assert Name.of("confidence") == Name("confidence")
    assert Name.of("input:images:0:mean") == Name("input", "images:0", "mean")
    before, now = {0: 100, 1: 100}, {0: 10, 1: 150}
    assert Name.of("confidence").distance(before, now) == ks_distance(before, now)
    assert Name.of("predicted").distance(before, now) == psi(before, now, ordered=False)
    assert Name.of("input:x:deviation").distance(before, now) == psi(before, now, ordered=True)
    assert (Name.of("confidence").measure, Name.of("output:y:mean").measure) == ("ks", "psi")
    assert len(Name.of("confidence").bins(before, now)) == 32
    assert [one.label for one in Name.of("predicted").bins(before, now, ["a", "b"])] == ["a", "b"]
