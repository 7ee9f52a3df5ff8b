"""Stop rules: what windows say, and what follows."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from agent.protocol.histogram import bucket_of
from fleet_server.domain.evidence import Change, Sample, Tally, change_of, fold
from fleet_server.domain.rules import Outcomes, Standing, judge_counted, judge_sampled
from fleet_server.domain.strategy import StopMetric, StopRule


def window(ms: float = 10.0, requests: int = 50, **fields: Any) -> Sample:
    return Sample(requests=requests, seconds=30.0, latency={bucket_of(ms / 1000): requests}, **fields)


def rule(metric: StopMetric, above: float, **fields: Any) -> StopRule:
    return StopRule(metric=metric, above=above, **fields)


def judge(one: StopRule, devices: dict[str, list[list[Sample]]], before: Sample | None) -> Standing:
    tallies = {
        profile: [fold(one, Tally(), windows, before=before) for windows in found] for profile, found in devices.items()
    }
    return judge_sampled(one, tallies)


SLOWER = rule(StopMetric.LATENCY_P95_RATIO, 1.3, min_samples=50)


def test_a_slower_version_is_found_after_few_windows_and_an_equal_one_never() -> None:
    before = window(10.0, 500)
    slow = judge(SLOWER, {"p": [[window(15.0)] for _ in range(20)]}, before)
    assert slow.stops
    assert slow.value == pytest.approx(1.5, rel=0.05)
    assert "latency_p95_ratio above 1.3" in slow.reason
    equal = judge(SLOWER, {"p": [[window(11.0)] * 200 for _ in range(20)]}, before)
    assert (equal.stops, equal.samples) == (False, 4000)


def test_one_slow_minute_or_one_slow_device_stops_nothing() -> None:
    before = window(10.0, 500)
    windows = [window(100.0)] * 3 + [window(10.0)] * 20
    assert not judge(SLOWER, {"p": [list(windows) for _ in range(20)]}, before).stops
    devices = [[window(100.0)] * 30] + [[window(10.0)] * 30 for _ in range(19)]
    assert not judge(SLOWER, {"p": devices}, before).stops


def test_a_version_that_is_worse_on_one_profile_is_found_and_the_profile_named() -> None:
    before = window(10.0, 500)
    devices = {"fast": [[window(10.0)] * 6 for _ in range(18)], "slow": [[window(15.0)] * 6 for _ in range(3)]}
    found = judge(SLOWER, devices, before)
    assert (found.stops, found.profile) == (True, "slow")
    assert "profile slow stands out" in found.reason


def test_small_windows_are_put_together_and_none_is_lost() -> None:
    before = window(10.0, 500)
    tally = fold(SLOWER, Tally(), [window(15.0, 20)] * 4, before=before)
    assert (tally.trials, tally.rest.requests) == (1, 20)
    again = fold(SLOWER, tally, [window(15.0, 20)] * 2, before=before)
    assert (again.trials, again.rest.requests) == (2, 0)


def test_without_a_past_nothing_is_compared() -> None:
    for before in (None, window(10.0, 5)):
        found = judge(SLOWER, {"p": [[window(100.0)] * 10]}, before)
        assert (found.value, found.stops) == (None, False)


def test_what_happens_to_all_is_not_the_versions_fault() -> None:
    before = window(10.0, 500)
    one = rule(StopMetric.LATENCY_P95_RATIO, 1.3, min_samples=50, against="control")
    change = change_of(one.metric, [(before, window(15.0, 500)) for _ in range(5)])
    assert change.factor == pytest.approx(1.5, rel=0.05)
    tallies = [fold(one, Tally(), [window(16.0)] * 6, before=before, change=change) for _ in range(20)]
    assert not judge_sampled(one, {"p": tallies}).stops
    worse = [fold(one, Tally(), [window(25.0)] * 6, before=before, change=change) for _ in range(20)]
    assert judge_sampled(one, {"p": worse}).stops
    assert change_of(one.metric, []) == Change()


@pytest.mark.parametrize(
    ("metric", "above", "before", "now", "value"),
    [
        (StopMetric.LATENCY_P95_MS, 20, None, window(30.0), 30),
        (StopMetric.LATENCY_P50_RATIO, 1.3, window(10.0), window(20.0), 2),
        (StopMetric.LATENCY_P99_RATIO, 1.3, window(10.0), window(20.0), 2),
        (StopMetric.ERROR_RISE_POINTS, 1, window(10.0, errors=5), window(10.0, errors=10), 10),
        (StopMetric.THROUGHPUT_DROP_PERCENT, 30, window(10.0, 100), window(10.0, 50), 50),
        (StopMetric.MEMORY_RISE_MB, 50, window(memory=200.0, hosts=2), window(memory=180.0, hosts=1), 80),
        (StopMetric.TEMPERATURE_C, 80, None, window(temperature=170.0, temperatures=2), 85),
        (
            StopMetric.TEMPERATURE_RISE_C, 5,
            window(temperature=60.0, temperatures=1), window(temperature=70.0, temperatures=1), 10,
        ),
    ],
)  # fmt: skip
def test_what_metrics_are(metric: StopMetric, above: float, before: Sample | None, now: Sample, value: float) -> None:
    one = rule(metric, above, min_samples=50)
    tally = fold(one, Tally(), [now], before=before)
    assert (tally.hits, tally.trials) == (1, 1)
    assert tally.mean == pytest.approx(value, rel=0.05)


def test_shares_count_every_request() -> None:
    errors = rule(StopMetric.ERROR_PERCENT, 1, min_samples=100)
    few = judge(errors, {"p": [[window(requests=99, errors=99)]]}, None)
    assert (few.stops, few.value) == (False, 100)
    assert judge(errors, {"p": [[window(requests=50, errors=50)] * 2]}, None).stops
    assert not judge(errors, {"p": [[window(requests=5000, errors=45)]] * 10}, None).stops
    drop = rule(StopMetric.ACCURACY_DROP_POINTS, 2, min_samples=100)
    wrong = [fold(drop, Tally(), [window(labelled=100, correct=80)], before=None, accuracy=0.95) for _ in range(3)]
    assert judge_sampled(drop, {"p": wrong}).stops
    right = [fold(drop, Tally(), [window(labelled=100, correct=94)], before=None, accuracy=0.95) for _ in range(3)]
    assert not judge_sampled(drop, {"p": right}).stops
    unknown = fold(drop, Tally(), [window(labelled=100, correct=0)], before=None, accuracy=None)
    assert judge_sampled(drop, {"p": [unknown]}).value is None


def test_without_a_confidence_the_value_decides() -> None:
    plain = rule(StopMetric.LATENCY_P95_RATIO, 1.3, min_samples=50, confidence=0)
    assert judge(plain, {"p": [[window(15.0)]]}, window(10.0, 500)).stops
    failed = rule(StopMetric.FAILED_PERCENT, 5)
    assert judge_counted(failed, {"p": Outcomes(sent=10, settled=1, failed=1, rolled_back=0)}).stops
    assert not judge_counted(failed, {"p": Outcomes(sent=20, settled=20, failed=1, rolled_back=0)}).stops


def test_counting_with_a_confidence() -> None:
    sure = rule(StopMetric.ROLLED_BACK_PERCENT, 0.5, confidence=0.95)
    assert not judge_counted(sure, {"p": Outcomes(20, 20, failed=5, rolled_back=1)}).stops
    found = judge_counted(sure, {"p": Outcomes(20, 20, failed=0, rolled_back=2)})
    assert found.stops
    assert found.reason.startswith("rolled_back_percent above 0.5: 2 of 20 deployments, 10 %; evidence 21.3 to 1")
    install = rule(StopMetric.INSTALL_FAILED_PERCENT, 0.5, confidence=0.95)
    assert not judge_counted(install, {"p": Outcomes(20, 20, failed=0, rolled_back=5)}).stops
    fell = rule(StopMetric.FELL_BACK_PERCENT, 5)
    assert judge_counted(fell, {"p": Outcomes(20, 20, 0, 0, fell_back=2), "q": Outcomes(10, 10, 0, 0)}).stops
    assert not judge_counted(fell, {"p": Outcomes(20, 20, 3, 3, fell_back=1)}).stops
    surely = rule(StopMetric.FELL_BACK_PERCENT, 0.5, confidence=0.95)
    assert judge_counted(surely, {"p": Outcomes(20, 20, 0, 0, fell_back=2)}).stops
    early = rule(StopMetric.FAILED_PERCENT, 5, min_samples=3)
    assert not judge_counted(early, {"p": Outcomes(10, 2, failed=2, rolled_back=0)}).stops
    assert judge_counted(early, {}).value is None


@pytest.mark.parametrize(
    "fields",
    [
        {"metric": "error_percent", "above": 1, "against": "control"},
        {"metric": "failed_percent", "above": 0, "confidence": 0.9},
        {"metric": "failed_percent", "above": 1, "confidence": 1},
        {"metric": "nothing", "above": 1},
    ],
)
def test_rules_that_can_not_be_judged_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        StopRule.model_validate(fields)
