"""Figures with their intervals."""

from __future__ import annotations

import random

import pytest

from agent.protocol.histogram import bucket_of
from agent.protocol.sketch import confidence_bin
from fleet_server.domain.comparison import Estimate, compared, confidence_percent, latency_ms, share
from fleet_server.domain.evidence import Sample


def drawn(seed: int, count: int = 400) -> Sample:
    chance = random.Random(seed)
    total = Sample()
    for _ in range(count):
        sure = confidence_bin(chance.betavariate(9, 1))
        total += Sample(
            requests=1,
            latency={bucket_of(0.01 * chance.lognormvariate(0, 0.5)): 1},
            labelled=1,
            correct=chance.random() < 0.9,
            shapes={"confidence": {sure: 1}},
        )
    return total


def test_shares_by_hand() -> None:
    assert share(0, 0) is None
    found = share(10, 100)
    assert found == Estimate(pytest.approx(10), pytest.approx(5.523, abs=0.01), pytest.approx(17.437, abs=0.01))
    none = share(0, 50)
    assert none is not None
    assert (none.value, none.low) == (0, pytest.approx(0, abs=1e-9))
    assert none.high > 5


def test_intervals_hold_what_is_true_as_often_as_they_say() -> None:
    accuracy = latency = confidence = 0
    for seed in range(100):
        one = drawn(seed)
        right, p95, sure = share(one.correct, one.labelled), latency_ms(one, 0.95), confidence_percent(one)
        assert right is not None
        assert p95 is not None
        assert sure is not None
        accuracy += right.low <= 90 <= right.high
        latency += p95.low <= 10 * 2.2759 <= p95.high
        confidence += sure.low <= 90 <= sure.high
    assert accuracy >= 88
    assert latency >= 88
    assert confidence >= 95, "its interval is a cautious one"


def test_what_neither_has_is_not_compared() -> None:
    names = [name for name, _, _ in compared(drawn(1, 30), Sample(requests=5, latency={3: 5}))]
    assert names == [
        "error_percent", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "accuracy_percent", "confidence_percent",
    ]  # fmt: skip
    assert [name for name, now, _ in compared(Sample(compared=50, disagreed=5), Sample()) if now] == [
        "disagreement_percent"
    ]
