"""A worker that hangs is told from one that has much to do, and from a supervisor that slept."""

from __future__ import annotations

import itertools

from agent.protocol.messages import ModelWindow
from agent.serving.ipc import Counts, Peeked
from agent.telemetry.crashes import Crashes
from agent.watchdog import ASK_S, IDLE_ASK_S, Watchdog


def peeked(*running_s: float) -> Peeked:
    return Peeked(1, tuple(Counts(str(number), running_s=one) for number, one in enumerate(running_s)), 1.0)


def test_an_inference_that_goes_on_for_too_long_is_a_hanging_and_a_long_queue_is_none() -> None:
    watchdog = Watchdog(60.0)
    watchdog.answered(Peeked(1, (Counts("d", oldest_s=900.0, running_s=59.0),), 1.0))
    assert watchdog.hangs() is None
    watchdog.answered(peeked(0.0, 61.0))
    assert watchdog.hangs() == "one inference has been going on for 61 s, 60 s are allowed"
    watchdog.answered(peeked(0.0, 0.1))
    assert watchdog.hangs() is None
    watchdog.answered(peeked(61.0))
    watchdog.rest()
    assert watchdog.hangs() is None, "that was of another worker"


def test_a_worker_that_answers_nothing_hangs_but_not_while_the_supervisor_itself_sleeps() -> None:
    watchdog = Watchdog(60.0)
    for now in range(60):
        assert watchdog.asks(float(now)) == (now % ASK_S == 0)
        assert watchdog.hangs() is None
    assert watchdog.asks(60.0)
    assert watchdog.hangs() == "it has not answered for 60 s"
    sleeper = Watchdog(60.0)
    assert sleeper.asks(0.0)
    assert sleeper.asks(10_000.0)
    assert sleeper.hangs() is None
    sleeper.answered(peeked())
    assert sleeper.hangs() is None


def test_an_idle_worker_is_asked_seldom_and_one_that_is_at_it_often() -> None:
    watchdog = Watchdog(120.0)

    def asked(begin: int, running_s: float) -> list[int]:
        found = [
            now
            for now in range(begin, begin + 60)
            if watchdog.asks(float(now)) and not watchdog.answered(peeked(running_s))
        ]
        return [later - earlier for earlier, later in itertools.pairwise(found)]

    assert set(asked(0, 0.0)) == {IDLE_ASK_S}
    assert set(asked(60, 20.0)) == {ASK_S}


def test_a_short_limit_is_asked_for_often_enough_and_none_is_never_asked_for() -> None:
    watchdog = Watchdog(1.0)
    assert sum(watchdog.asks(quarter / 4) for quarter in range(5)) == 5
    assert watchdog.hangs() == "it has not answered for 1 s"
    endless = Watchdog(0.0)
    assert not any(endless.asks(float(now)) for now in range(1000))
    endless.answered(peeked(1e6))
    assert endless.hangs() is None


def test_crashes_come_into_the_next_window_of_what_they_are_counted_for() -> None:
    crashes = Crashes()
    for _ in range(2):
        crashes.count("m", "1", "a", "one", "cpu")
    crashes.count("n", "3", "c", "gone", "cpu")
    served, other = ModelWindow("m", "1", "a", "one", "cpu", 7), ModelWindow("m", "2", "b", "two", "cpu", 8)
    first, second, third = crashes.added_to([served, other])
    assert (first.requests, first.crashes, second) == (7, 2, other)
    assert (third.deployment_id, third.requests, third.crashes) == ("gone", 0, 1)
    assert crashes.added_to([served]) == (served,), "each is told once"
