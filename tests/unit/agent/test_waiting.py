"""Requests that wait: the most urgent first, bounded, given up in time; and how large a batch may be."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.serving.batch_times import BatchTimes
from agent.serving.waiting import ClosedError, QueueFullError, Request, RequestQueue


def request(priority: int = 50, rows: int = 1) -> Request:
    return Request({"x": np.zeros((rows, 1), np.float32)}, rows, "", time.perf_counter(), lambda _one: None, priority)


def taken(queue: RequestQueue) -> list[Request]:
    queue.close()
    found = []
    while (one := queue.take()) is not None:
        found.append(one)
    return found


@given(st.lists(st.integers(1, 100), max_size=40))
def test_the_most_urgent_goes_first_and_of_equals_who_came_first(priorities: list[int]) -> None:
    queue = RequestQueue(100)
    requests = [request(priority) for priority in priorities]
    for one in requests:
        assert queue.put(one) is None
    found = taken(queue)
    assert found == sorted(requests, key=lambda one: one.priority)
    assert len(queue) == 0
    assert not any(one.waits for one in found)


def test_a_full_queue_refuses_all_but_the_more_urgent_for_whom_the_last_goes() -> None:
    queue = RequestQueue(3)
    first, second, third = request(50), request(60), request(60)
    for one in (first, second, third):
        queue.put(one)
    for priority in (60, 70):
        with pytest.raises(QueueFullError):
            queue.put(request(priority))
    urgent = request(1)
    assert queue.put(urgent) is third
    assert not third.waits
    assert taken(queue) == [urgent, first, second]


def test_what_is_given_up_is_not_given_out_and_only_what_waits_can_be() -> None:
    queue = RequestQueue(10)
    requests = [request() for _ in range(3)]
    for one in requests:
        queue.put(one)
    assert queue.give_up(requests[1])
    assert not queue.give_up(requests[1])
    assert queue.take() is requests[0]
    assert not queue.give_up(requests[0])
    assert taken(queue) == [requests[2]]


def test_a_closed_queue_takes_nothing_in_and_lets_go_who_waits_for_more() -> None:
    queue = RequestQueue(10)
    found: list[Request | None] = []
    waiting = threading.Thread(target=lambda: found.append(queue.take()))
    waiting.start()
    queue.close()
    waiting.join(10)
    assert found == [None]
    with pytest.raises(ClosedError):
        queue.put(request())


def test_company_is_waited_for_no_longer_than_it_may_be() -> None:
    queue = RequestQueue(10)
    assert queue.take_like(lambda _one: True, time.perf_counter() - 1) is None
    until = time.perf_counter() + 0.05
    assert queue.take_like(lambda _one: True, until) is None
    assert time.perf_counter() >= until
    late = request()
    threading.Timer(0.05, lambda: queue.put(late)).start()
    assert queue.take_like(lambda _one: True, time.perf_counter() + 30) is late


def test_one_that_does_not_fit_stays_first() -> None:
    queue = RequestQueue(10)
    large, small = request(rows=8), request(rows=1)
    queue.put(large)
    queue.put(small)
    assert queue.take_like(lambda one: one.rows < 8, time.perf_counter() + 30) is None
    assert taken(queue) == [large, small]


def test_a_batch_grows_only_as_far_as_it_is_known_to_be_in_time() -> None:
    times = BatchTimes()
    assert times.most(64, 10.0) == 1, "nothing is known"
    for _ in range(50):
        times.measured(1, 0.010)
    assert times.most(64, 0.085) == 8, "by the row, for nothing else is known"
    for _ in range(50):
        times.measured(8, 0.020)
    assert times.most(64, 0.085) == 32
    assert times.most(20, 0.085) == 20
    assert times.most(64, 0.001) == 1


@given(
    st.lists(st.tuples(st.integers(1, 512), st.floats(1e-6, 10)), min_size=1, max_size=30),
    st.integers(1, 512),
    st.floats(1e-6, 10),
)
def test_no_batch_is_larger_than_allowed_or_reckoned_to_be_late(
    measured: list[tuple[int, float]], limit: int, budget_s: float
) -> None:
    times = BatchTimes()
    for rows, seconds in measured:
        times.measured(rows, seconds)
    most = times.most(limit, budget_s)
    assert 1 <= most <= limit
    reckoned = times.seconds(most)
    assert reckoned is not None
    assert most == 1 or reckoned <= budget_s


def test_a_batch_that_was_slow_once_is_tried_again() -> None:
    times = BatchTimes()
    times.measured(1, 0.0002)
    times.measured(2, 0.02)  # the processors were another's
    assert times.most(8, 0.001) == 1
    tries = 0
    while times.most(8, 0.001) == 1:
        times.measured(1, 0.0002)
        tries += 1
    assert 100 < tries < 1000
