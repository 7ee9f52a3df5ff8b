"""Threads write in the order in which they asked."""

from __future__ import annotations

import threading
import time

import pytest

from fleet_server.turns import Turns


def waiting(turns: Turns) -> int:
    return len(turns._waiting)


def until_waiting(turns: Turns, count: int) -> None:
    until = time.monotonic() + 10
    while waiting(turns) < count:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_they_come_in_the_order_in_which_they_asked_and_one_at_a_time() -> None:
    turns, order, inside = Turns(), [], [0]

    def work(number: int) -> None:
        with turns:
            inside[0] += 1
            assert inside[0] == 1
            order.append(number)
            time.sleep(0.001)
            inside[0] -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            until_waiting(turns, number + 1)
    for thread in threads:
        thread.join(10)
    assert order == list(range(20))


def test_one_that_asks_again_at_once_shuts_nobody_out() -> None:
    turns, stop, others = Turns(), threading.Event(), []

    def greedy() -> None:
        while not stop.is_set():
            with turns:
                pass

    thread = threading.Thread(target=greedy)
    thread.start()
    try:
        for _ in range(200):
            with turns:
                others.append(1)
    finally:
        stop.set()
        thread.join(10)
    assert len(others) == 200


def test_what_fails_inside_gives_the_turn_on() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="inside"), turns:
        raise ValueError("inside")
    with turns:
        pass


def test_one_that_is_interrupted_while_it_waits_gives_its_turn_on() -> None:
    turns = Turns()

    class Interrupted(BaseException):
        pass

    class Lock:
        """A turn whose holder is interrupted: before it was handed over, or just after."""

        def __init__(self, *, late: bool) -> None:
            self._late = late
            self.asked = 0

        def acquire(self) -> bool:
            self.asked += 1
            if self.asked > 1:
                if self._late:
                    turns.__exit__(None, None, None)
                raise Interrupted
            return True

        def release(self) -> None:
            pass

    for late in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            turns.__enter__()
            patch.setattr("fleet_server.turns.threading.Lock", lambda late=late: Lock(late=late))
            with pytest.raises(Interrupted):
                turns.__enter__()
        if not late:
            turns.__exit__(None, None, None)
        with turns:
            pass
        assert waiting(turns) == 0
