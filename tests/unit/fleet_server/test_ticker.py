"""The thread that does one thing over and over."""

from __future__ import annotations

import logging
import threading

import pytest

from fleet_server.errors import InvalidError
from fleet_server.ticker import Ticker

LONG_S = 60.0


def test_a_tick_that_fails_is_said_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    third = threading.Event()
    wrong: list[Exception | None] = [None, InvalidError("bad_key", "no such key"), ValueError("odd")]

    def tick() -> None:
        error = wrong.pop() if wrong else None
        if not wrong:
            third.set()
        if error is not None:
            raise error

    ticker = Ticker("tester", tick, 0.001, at_once=True)
    with caplog.at_level(logging.ERROR):
        ticker.start()
        assert third.wait(LONG_S)
        ticker.stop()
    odd, key = caplog.records[:2]
    assert (odd.getMessage(), odd.exc_info is not None) == ("a tick of the tester failed; it goes on", True)
    assert (key.getMessage(), key.exc_info) == ("tester: no such key; it goes on", None), "a sentence, no traceback"


def test_what_wakes_it_meanwhile_is_not_forgotten() -> None:
    in_first, go_on, second = threading.Event(), threading.Event(), threading.Event()
    calls: list[int] = []

    def tick() -> None:
        calls.append(1)
        if len(calls) == 1:
            in_first.set()
            go_on.wait(LONG_S)
        else:
            second.set()

    ticker = Ticker("tester", tick, LONG_S, at_once=True)
    ticker.start()
    assert in_first.wait(LONG_S)
    ticker.wake()
    go_on.set()
    assert second.wait(LONG_S), "without waking it, it rests for a minute"
    ticker.stop()


def test_stopping_ends_a_rest_between_and_within_ticks() -> None:
    resting = threading.Event()
    stopped: list[bool] = []

    def tick() -> None:
        resting.set()
        stopped.append(ticker.rest(LONG_S))

    ticker = Ticker("tester", tick, LONG_S, at_once=True)
    ticker.start()
    assert resting.wait(LONG_S)
    ticker.stop()
    assert (stopped, ticker.stopping) == ([True], True)
    never = Ticker("tester", lambda: stopped.append(False), LONG_S)
    never.start()
    never.stop()
    assert stopped == [True], "the first call comes after a rest"
