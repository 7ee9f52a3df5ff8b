"""Open pages share what they ask the API: once a turn, for all of one person that show the same."""

from __future__ import annotations

import asyncio

import pytest

from fleet_server.web.live import LOOK_S, Looks, turn_of, until_next


class Asking:
    """An API that says how often it was asked; answers come later."""

    def __init__(self) -> None:
        self.times = 0

    async def __call__(self) -> list[bytes]:
        self.times += 1
        await asyncio.sleep(0)
        return [b"%d" % self.times]


def test_a_hundred_pages_ask_once_a_turn() -> None:
    async def run() -> None:
        looks, ask = Looks(), Asking()
        pages = [looks.page("ada: /rollouts/1") for _ in range(100)]
        for page in pages:
            page.__enter__()
        for turn in range(3):
            now = turn * LOOK_S + 0.5
            found = await asyncio.gather(*(looks.look("ada: /rollouts/1", now, ask) for _ in pages))
            assert found == [[b"%d" % (turn + 1)]] * 100
        assert ask.times == 3
        for page in pages:
            page.__exit__(None, None, None)
        assert len(looks) == 0

    asyncio.run(run())


def test_what_one_person_is_told_is_not_told_another() -> None:
    async def run() -> None:
        looks, hers, his = Looks(), Asking(), Asking()
        with looks.page(("ada", "/devices")), looks.page(("bob", "/devices")):
            await looks.look(("ada", "/devices"), 0.0, hers)
            await looks.look(("bob", "/devices"), 0.0, his)
            assert (hers.times, his.times) == (1, 1)

    asyncio.run(run())


def test_a_page_that_closes_while_it_asks_takes_the_answer_from_nobody() -> None:
    async def run() -> None:
        looks, ask = Looks(), Asking()
        with looks.page("k"):
            first = asyncio.ensure_future(looks.look("k", 0.0, ask))
            second = asyncio.ensure_future(looks.look("k", 0.0, ask))
            await asyncio.sleep(0)
            first.cancel()
            assert await second == [b"1"]

    asyncio.run(run())


@pytest.mark.parametrize("key", ["a", "b", ("c", 1)])
def test_the_next_turn_begins_when_it_says(key: object) -> None:
    now = 1234.56
    wait = until_next(key, now)
    assert 0 < wait <= LOOK_S
    assert turn_of(key, now + wait + 1e-6) == turn_of(key, now) + 1
    assert turn_of(key, now + wait - 1e-6) == turn_of(key, now)
