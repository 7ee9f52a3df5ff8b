"""Waves of devices share a stream: what it costs in messages, whom it waits for, and that everybody gets everything."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol.messages import ChunkRange, Need
from agent.update.download import Allowance
from fleet_server.gateway import bitmaps
from fleet_server.gateway.repairs import group
from fleet_server.gateway.streamer import GATHER_S, STALLED_CHUNKS, Streamer
from tests.unit.fleet_server.wave import Link, Wave

LONG = 600.0
DIGEST = "a" * 64


@pytest.fixture
def wave(tmp_path: Path) -> Iterator[Wave]:
    made = Wave(tmp_path, chunks=80)
    yield made
    made.close()


def need(first: int, last: int, window: int = 4) -> Need:
    return Need(DIGEST, "d", (ChunkRange(first, last),), window)


def test_needs_are_gathered_then_what_two_of_two_lack_is_broadcast_within_the_window() -> None:
    streamer = Streamer()
    streamer.hear("one", need(0, 9), 0.0)
    streamer.hear("two", need(2, 9), 0.1)
    assert list(streamer.next(GATHER_S / 2, 100)) == []
    sends = list(streamer.next(GATHER_S, 100))
    assert [(send.chunks, send.device_id) for send in sends] == [
        ((0,), "one"),
        ((1,), "one"),
        ((2,), None),
        ((3,), None),
    ]
    assert list(streamer.next(GATHER_S + 0.01, 100)) == []


def test_what_was_sent_before_something_that_came_is_lost_and_sent_again_to_the_one() -> None:
    streamer = Streamer()
    streamer.hear("one", need(0, 9), 0.0)
    assert len(list(streamer.next(GATHER_S, 100))) == 4
    missing = (ChunkRange(1, 1), ChunkRange(4, 9))
    streamer.hear("one", Need(DIGEST, "d", missing, 4), 0.35)  # too early to tell: it may have been overtaken
    assert 1 not in {send.chunks[0] for send in streamer.next(0.35, 100)}
    streamer.hear("one", Need(DIGEST, "d", (ChunkRange(1, 1), ChunkRange(5, 9)), 4), 0.7)
    assert 1 not in {send.chunks[0] for send in streamer.next(0.71, 100)}  # what is lost is gathered first
    assert ((1,), "one") in {(send.chunks, send.device_id) for send in streamer.next(3.0, 100)}


def test_where_nothing_comes_only_the_oldest_is_tried_again_ever_more_rarely() -> None:
    streamer = Streamer()
    streamer.hear("one", need(0, 9), 0.0)
    assert len(list(streamer.next(GATHER_S, 100))) == 4
    tried = []
    for step in range(1, 600):
        now = GATHER_S + step / 10
        streamer.hear("one", need(0, 9), now)
        tried += [(now, send.chunks) for send in streamer.next(now, 100)]
    assert {chunks for _, chunks in tried} <= {(0,), (1,), (2,), (3,)}
    assert 3 <= len(tried) <= 6


def test_a_device_that_rests_is_waited_for_until_then() -> None:
    streamer = Streamer()
    for name in ("one", "two", "three"):
        streamer.hear(name, need(0, 9), 0.0)
    list(streamer.next(GATHER_S, 100))
    for name in ("one", "two"):
        streamer.hear(name, need(4, 9), 1.0)
    streamer.hear("three", Need(DIGEST, "d", (ChunkRange(4, 9),), 0, rest_s=5.0), 1.0)
    for now in (1.1, 3.0, 5.9):
        for name in ("one", "two"):
            streamer.hear(name, need(4, 9), now)
        assert list(streamer.next(now, 100)) == []
    streamer.hear("three", need(4, 9), 6.0)
    assert len(list(streamer.next(6.1, 100))) == 4


def test_a_device_alone_is_sent_what_it_lacks_and_nobody_waits_for_it() -> None:
    streamer = Streamer()
    for name in ("one", "two", "three"):
        streamer.hear(name, need(0, 9), 0.0)
    streamer.hear("alone", Need(DIGEST, "d", (ChunkRange(0, 9),), 1, alone=True), 0.0)
    sends = [(send.chunks, send.device_id) for send in streamer.next(GATHER_S, 100)]
    assert sends == [((0,), None), ((1,), None), ((2,), None), ((3,), None), ((0,), "alone")]


def test_a_wave_costs_one_copy(wave: Wave) -> None:
    for number in range(50):
        wave.add(f"d{number}", joins=number * 0.004)
    wave.run(LONG)
    assert wave.done
    assert len(wave.sends) == 80
    wave.check()


def test_five_slow_ones_of_fifty_set_the_pace_and_cost_no_second_copy(wave: Wave) -> None:
    for number in range(50):
        wave.add(f"d{number}", Link(chunks_s=40.0) if number < 5 else None)
    wave.run(LONG)
    assert wave.done
    assert len(wave.sends) == 80
    assert max(one.most_waiting for one in wave.devices.values()) <= 33
    wave.check()


def test_a_device_slower_than_a_chunk_a_second_is_not_sent_things_twice(wave: Wave) -> None:
    wave.add("slow", Link(chunks_s=0.4))
    wave.run(LONG)
    assert wave.done
    assert len(wave.sends) <= 80 + 6
    wave.check()


def test_a_stalled_device_is_not_waited_for_and_gets_the_rest_afterwards(wave: Wave) -> None:
    for number in range(49):
        wave.add(f"d{number}")
    stalled = wave.add("stalled", Link(down=(0.16, 20.0)))
    wave.run(LONG)
    assert wave.done
    others = [one.done_at or LONG for one in wave.devices.values() if one is not stalled]
    assert max(others) < 3.0
    assert stalled.done_at is not None
    assert stalled.done_at > 20.0
    assert len(wave.sends) <= 80 * 2
    wave.check()


def test_the_broker_keeps_little_for_those_that_stalled(tmp_path: Path) -> None:
    wave = Wave(tmp_path, chunks=3000)
    for number in range(6):
        wave.add(f"d{number}")
    for number in range(4):
        wave.add(f"stalled{number}", Link(chunks_s=0.01))
    wave.run(20.0)
    waiting = sum(one.most_waiting for one in wave.devices.values() if one.name.startswith("stalled"))
    assert waiting <= STALLED_CHUNKS + 4 * 32
    wave.close()


def test_late_joiners_ride_along_and_get_the_rest_after(wave: Wave) -> None:
    for number in range(20):
        wave.add(f"d{number}", Link(chunks_s=40.0))
    for number in range(4):
        wave.add(f"late{number}", Link(chunks_s=40.0), joins=1.2 + number * 0.05)
    wave.run(LONG)
    assert wave.done
    order = [send.chunks[0] for _, send in wave.sends]
    assert order[:80] == list(range(80))  # nobody made it begin anew
    before = sum(at < 1.4 for at, _ in wave.sends)
    assert len(wave.sends) <= 80 + before
    wave.check()


def test_one_late_joiner_is_sent_the_rest_alone(wave: Wave) -> None:
    for number in range(20):
        wave.add(f"d{number}", Link(chunks_s=40.0))
    wave.add("late", Link(chunks_s=40.0), joins=1.0)
    wave.run(LONG)
    assert wave.done
    alone = [send for _, send in wave.sends if send.device_id is not None]
    assert {send.device_id for send in alone} == {"late"}
    assert len(alone) < 80
    wave.check()


@pytest.mark.parametrize("seed", range(5))
def test_two_percent_lost_at_each_of_fifty_costs_less_than_a_quarter_more(tmp_path: Path, seed: int) -> None:
    wave = Wave(tmp_path, chunks=80, seed=seed)
    for number in range(50):
        wave.add(f"d{number}", Link(loss=0.02, twice=0.05, late=0.05))
    wave.run(LONG)
    assert wave.done
    assert len(wave.sends) <= 80 * 1.25
    wave.check()


links = st.builds(
    Link,
    chunks_s=st.sampled_from([5.0, 50.0, 1000.0]),
    loss=st.sampled_from([0.0, 0.02, 0.3]),
    twice=st.sampled_from([0.0, 0.2]),
    late=st.sampled_from([0.0, 0.3]),
    down=st.tuples(st.floats(0, 5), st.floats(0, 20)),
)
allowances = st.builds(Allowance, window=st.sampled_from([1, 4, 32]), alone=st.booleans())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    chunks=st.integers(1, 60),
    devices=st.lists(
        st.tuples(links, st.floats(0, 5), allowances, st.floats(0, 1), st.none() | st.floats(1, 8)),
        min_size=1,
        max_size=8,
    ),
)
def test_whatever_happens_on_the_way_everybody_gets_everything(
    seed: int,
    chunks: int,
    devices: list[tuple[Link, float, Allowance, float, float | None]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wave = Wave(Path(folder), chunks=chunks, seed=seed)
        for number, (link, joins, allowed, share, leaves) in enumerate(devices):
            device = wave.add(f"d{number}", link, joins=joins, allowed=allowed, has=int(share * (chunks - 1)))
            device.leaves = joins + leaves if leaves is not None else LONG
        wave.run(LONG)
        try:
            assert wave.done
            # Each loss costs a repair; a connection that broke, what it had in flight.
            assert len(wave.sends) <= len(devices) * (chunks * 2.5 + 60)
        finally:
            wave.check()


@given(
    lost=st.dictionaries(st.integers(0, 40), st.sets(st.sampled_from("abcdefgh"), min_size=1, max_size=2), max_size=20)
)
def test_each_device_lacks_one_of_the_chunks_that_are_repaired_together(lost: dict[int, set[str]]) -> None:
    missing: dict[str, int] = {}
    for chunk, names in lost.items():
        for name in names:
            missing[name] = missing.get(name, 0) | 1 << chunk
    groups = group(lost, missing)
    assert sorted(chunk for one in groups for chunk in one.chunks) == sorted(lost)
    for one in groups:
        assert len(one.chunks) <= 16
        for name, chunk in one.mends.items():
            assert [other for other in one.chunks if missing[name] >> other & 1] == [chunk]


def test_a_need_that_could_not_say_all_forgets_nothing() -> None:
    streamer = Streamer()
    streamer.hear("one", need(0, 2000, window=4096), 0.0)
    list(streamer.next(GATHER_S, 3000))
    every_second = tuple(ChunkRange(chunk, chunk) for chunk in range(0, 512, 2))
    for now in (0.4, 0.75):
        streamer.hear("one", Need(DIGEST, "d", every_second, 4096), now)
    again = {send.chunks[0] for now in (2.0, 5.0) for send in streamer.next(now, 3000)}
    assert again == set(range(0, 510, 2))  # nothing later came that could tell of the last


@given(st.sets(st.integers(0, 300)), st.integers(0, 300), st.integers(0, 20))
def test_bitmaps_are_sets(chunks: set[int], start: int, count: int) -> None:
    bitmap = bitmaps.from_ranges(ChunkRange(chunk, chunk) for chunk in chunks)
    assert list(bitmaps.members(bitmap)) == sorted(chunks)
    circle = sorted(chunks, key=lambda one: (one < start, one))
    assert set(bitmaps.members(bitmaps.first_from(bitmap, start, count))) == set(circle[:count])
