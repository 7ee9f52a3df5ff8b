"""A version that serves badly is found out before its time is over; one that does well is let go, with its numbers."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol.histogram import bucket_of
from agent.protocol.messages import ProbationPolicy
from agent.serving.ipc import Counts, Peeked
from agent.update.probation import SILENT_ASKS, STUCK_S, Over, Probation, fall_back

POLICY = ProbationPolicy(seconds=10.0)
FAST, SLOW = bucket_of(0.010), bucket_of(0.050)


def watch(policy: ProbationPolicy = POLICY, *, before_mb: float | None = 100.0) -> Probation:
    """A probation of `new` that began at 0, beside `old`."""
    probation = Probation()
    probation.begin("new", policy, 0.0, before_id="old", before_mb=before_mb, provider="cpu")
    return probation


def hear(
    probation: Probation, now: float, *, old: Counts | None = None, rss_mb: float = 100.0, **new: Any
) -> list[Over]:
    counts = (Counts("new", **new), *([old] if old else []))
    probation.counted(Peeked(1, counts, rss_mb), now)
    return probation.tick(now)


def good(requests: int, bucket: int = FAST) -> dict[str, Any]:
    return {"requests": requests, "latency": {bucket: requests}}


OLD = Counts("old", requests=1000, rejected=10, recent={FAST: 500})


def test_it_stays_when_the_time_is_over_and_the_counts_of_its_end_are_in() -> None:
    probation = watch()
    assert hear(probation, 9.9, old=OLD, **good(50)) == []
    assert probation.tick(11.0) == [], "what happened in the last second is not known"
    (over,) = hear(probation, 11.1, old=OLD, **good(60))
    assert over.problem is None
    assert (over.report.requests, over.report.errors, over.report.exercised) == (60, 0, True)
    assert over.report.latency_p95_ms is not None
    assert abs(over.report.latency_p95_ms - 10) < 0.5
    assert over.report.before_p95_ms == over.report.latency_p95_ms
    assert not probation.asks(12.0)


def test_errors_end_it_at_once() -> None:
    probation = watch(ProbationPolicy(seconds=3600.0))
    assert hear(probation, 1.0, requests=4, errors=4) == [], "too few"
    (over,) = hear(probation, 2.0, requests=5, errors=5)
    assert over.problem == "5 of 5 requests failed while the version was watched"
    assert hear(watch(), 2.0, requests=100, errors=20) == [], "as many as are allowed"


def test_five_times_slower_than_the_one_before_is_found_out() -> None:
    probation = watch()
    assert hear(probation, 2.0, old=OLD, **good(99, SLOW)) == [], "too few to say so early"
    (over,) = hear(probation, 3.0, old=OLD, **good(100, SLOW))
    assert over.problem is not None
    assert "5.0 times that of the version before" in over.problem
    late = watch()
    (over,) = hear(late, 10.0, old=OLD, **good(20, SLOW))
    assert over.problem is not None, "at the end fewer will do"
    assert hear(watch(), 10.0, old=OLD, **good(19, SLOW))[0].problem is None


def test_latency_is_not_compared_without_samples_of_both_nor_below_the_noise() -> None:
    few = msgspec.structs.replace(OLD, recent={FAST: 19})
    assert hear(watch(), 10.0, old=few, **good(500, SLOW))[0].problem is None
    assert hear(watch(), 10.0, **good(500, SLOW))[0].problem is None
    tiny = msgspec.structs.replace(OLD, recent={bucket_of(0.0002): 500})
    assert hear(watch(), 10.0, old=tiny, **good(500, bucket_of(0.0015)))[0].problem is None
    free = ProbationPolicy(seconds=10.0, latency_ratio=0.0)
    assert hear(watch(free), 10.0, old=OLD, **good(500, SLOW))[0].problem is None


def test_a_version_that_takes_other_inputs_is_found_out_though_it_answers_nothing() -> None:
    (over,) = hear(watch(), 1.0, old=OLD, rejected=30)
    assert over.problem is not None
    assert "30 of 30 requests were refused" in over.problem
    clumsy = Counts("old", requests=500, rejected=500)
    assert hear(watch(), 1.0, old=clumsy, rejected=30, **good(30)) == [], "its clients always asked wrongly"


def test_a_request_that_is_never_answered_is_no_good_sign() -> None:
    probation = watch()
    assert hear(probation, 10.5, oldest_s=8.0) == [], "it is waited for"
    (over,) = hear(probation, 13.0, oldest_s=STUCK_S)
    assert over.problem == "a request was not answered within 10 s while the version was watched"
    slow_ones = Counts("old", requests=100, recent={bucket_of(5.0): 100})
    assert hear(watch(), 12.0, old=slow_ones, oldest_s=12.0) == [], "it may be one of those"


def test_with_little_traffic_it_goes_on_and_ends_as_not_exercised() -> None:
    policy = ProbationPolicy(seconds=10.0, minimum_requests=50, at_most_s=60.0)
    probation = watch(policy)
    assert hear(probation, 10.0, **good(3)) == []
    assert hear(probation, 59.0, **good(3)) == []
    (over,) = hear(probation, 60.0, **good(3))
    assert over.problem is None
    assert (over.report.exercised, over.report.requests) == (False, 3)
    sooner = watch(policy)
    hear(sooner, 10.0, **good(3))
    (over,) = hear(sooner, 20.0, **good(50))
    assert over.report.exercised


def test_more_memory_than_is_allowed_ends_it() -> None:
    policy = ProbationPolicy(seconds=60.0, memory_mb=150.0)
    assert hear(watch(policy), 1.0, rss_mb=250.0) == []
    (over,) = hear(watch(policy), 1.0, rss_mb=251.0)
    assert over.problem == "it added 151 MiB to the inference worker, 150 MiB are allowed"
    assert hear(watch(policy, before_mb=None), 1.0, rss_mb=9000.0) == [], "nobody knows what it added"


def grown(sizes: list[float]) -> list[Over]:
    probation = watch(ProbationPolicy(seconds=3600.0, growth_mb=64.0))
    found: list[Over] = []
    for second, size in enumerate(sizes):
        found += hear(probation, float(second + 1), rss_mb=size)
    return found


def test_memory_that_does_not_stop_growing_ends_it() -> None:
    (over,) = grown([100 + 10 * second for second in range(20)])
    assert over.problem is not None
    assert "did not stop growing" in over.problem
    assert grown([100 + min(200, 40 * second) for second in range(60)]) == [], "buffers that found their size"
    assert grown([100 if second < 30 else 300 for second in range(60)]) == [], "one larger request"
    assert grown([100 + 0.5 * second for second in range(60)]) == [], "not worth it yet"


@settings(deadline=None)
@given(st.lists(st.floats(0, 60), min_size=0, max_size=120))
def test_memory_that_stays_within_what_is_allowed_never_ends_it(noise: list[float]) -> None:
    assert grown([100 + one for one in noise]) == []


def test_a_worker_that_does_not_answer_is_stuck_and_a_busy_supervisor_is_not() -> None:
    probation = watch(ProbationPolicy(seconds=3600.0))
    hear(probation, 5.0, **good(10))
    assert probation.asks(6.0)
    assert probation.tick(500.0) == [], "the supervisor had other things to do: the answer lies in its queue"
    for second in range(SILENT_ASKS - 1):
        assert probation.asks(501.0 + second)
        assert probation.tick(501.0 + second) == []
    assert probation.asks(530.0)
    (over,) = probation.tick(530.0)
    assert over.silent
    assert over.problem == "the inference worker did not answer for 20 s while the version was watched"
    assert over.report.requests == 10


def test_the_worker_is_asked_every_second_and_at_the_end() -> None:
    probation = Probation()
    assert not probation.asks(0.0)
    probation.begin("new", ProbationPolicy(seconds=2.5), 0.0)
    asked = [step / 10 for step in range(31) if probation.asks(step / 10)]
    assert asked == [0.0, 1.0, 2.0, 2.5]


def test_a_dead_worker_ends_all_watching_and_what_was_seen_is_told() -> None:
    probation = watch()
    hear(probation, 3.0, **good(7))
    assert probation.clear()["new"].requests == 7
    assert probation.tick(100.0) == []


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 400), st.floats(0.0, 30.0))
def test_a_judgement_always_has_its_reason_in_the_numbers(
    requests: int, errors: int, rejected: int, now: float
) -> None:
    errors = min(errors, requests)
    probation = watch()
    for over in hear(probation, now, old=OLD, requests=requests, errors=errors, rejected=rejected):
        assert (over.report.requests, over.report.errors, over.report.rejected) == (requests, errors, rejected)
        bad = errors > 0.2 * requests or rejected > 0.2 * (requests + rejected)
        assert bad if over.problem else now >= POLICY.seconds


def test_a_fall_back_to_the_cpu_is_noted() -> None:
    assert fall_back("cpu", "cuda: no driver") == "it runs on cpu, because of cuda: no driver"
    assert fall_back("cuda", "") == ""
