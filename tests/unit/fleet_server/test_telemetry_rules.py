"""What telemetry is made of without a database: sets of sequences, and sums however they are made."""

from __future__ import annotations

import datetime as dt
import random

from hypothesis import given
from hypothesis import strategies as st

from agent.protocol.histogram import bucket_of, percentile
from fleet_server.telemetry.sequences import RANGES, Sequences
from fleet_server.telemetry.sketches import pack_cells, pack_latency, unpack_cells, unpack_latency
from fleet_server.telemetry.totals import CELLS, DAY_S, HOUR_S, MOST, Part, Total, period_of

START = dt.datetime(2026, 1, 1, 12, 30, tzinfo=dt.UTC)


@given(st.lists(st.sets(st.integers(0, 300)), max_size=8))
def test_a_set_of_sequences_is_a_set(parts: list[set[int]]) -> None:
    found, truth = Sequences(), set()
    for part in parts:
        found = Sequences(found.packed())
        found.add(part)
        truth |= part
    assert {one for one in range(302) if one in found} == truth
    assert len(found) == len(truth)
    assert all(last + 1 < first for (_, last), (first, _) in zip(found.ranges, found.ranges[1:], strict=False))


def test_a_spool_that_counts_by_one_needs_one_range() -> None:
    numbers = list(range(1, 20_001))
    random.Random(0).shuffle(numbers)
    found = Sequences()
    for start in range(0, len(numbers), 500):
        found.add(numbers[start : start + 500])
    assert found.ranges == [(1, 20_000)]
    assert len(found.packed()) < 10


def test_a_spool_that_skips_without_end_keeps_its_newest_gaps() -> None:
    found = Sequences()
    found.add(range(0, 4 * RANGES, 2))
    assert len(found.ranges) == RANGES
    assert found.ranges[0] == (0, 2 * RANGES)
    assert 4 * RANGES - 3 not in found
    assert 4 * RANGES - 2 in found


def part(number: int, latency: dict[int, int], cells: list[tuple[int, int, int]], requests: int = 1) -> Part:
    at = START + dt.timedelta(seconds=10 * number)
    packed = (pack_latency(latency), pack_cells(cells))
    return Part(1, at, at + dt.timedelta(seconds=10), None, requests, 0, 0, requests, *packed)


def test_a_sum_of_sums_is_the_sum_of_all_and_its_percentile_is_that_of_all_requests() -> None:
    rng = random.Random(1)
    parts, times = [], []
    for number in range(60):
        # A few slow devices among many fast ones: the mean of the parts' p99 is far from the p99 of all.
        mine = [rng.lognormvariate(-6 + 3 * (number % 20 == 0), 0.4) for _ in range(1000 if number % 20 else 20)]
        times += mine
        latency: dict[int, int] = {}
        for one in mine:
            latency[bucket_of(one)] = latency.get(bucket_of(one), 0) + 1
        parts.append(part(number, latency, [(0, number % 2, 1)], len(mine)))
    whole = Total.of(parts)
    assert whole is not None
    hours = []
    for start in range(0, 60, 7):
        some = Total.of(parts[start : start + 7])
        assert some is not None
        hours.append(Part(1, *some.values().values()))  # type: ignore[arg-type]
    again = Total.of(hours)
    assert again == whole
    truth = sorted(times)[round(0.99 * len(times)) - 1]
    found = percentile(again.latency, 0.99)
    assert found is not None
    assert abs(found / truth - 1) < 0.021
    means = [percentile(unpack_latency(one.latency), 0.99) or 0.0 for one in parts]
    assert abs(sum(means) / len(means) / truth - 1) > 0.1
    assert (again.requests, again.busy_s, again.confusion) == (len(times), 600.0, {(0, 0): 30, (0, 1): 30})


def test_what_is_empty_takes_no_room() -> None:
    assert (pack_latency({}), pack_cells([])) == (b"", b"")
    assert (unpack_latency(b""), unpack_cells(b"")) == ({}, [])


def test_sums_of_a_hostile_device_stay_what_a_column_holds() -> None:
    total = Total(START, START)
    for number in range(3):
        total.add(part(number, {3: MOST}, [(label, number, MOST) for label in range(CELLS // 2)], MOST))
    assert len(total.confusion) == CELLS
    values = total.values()
    assert (values["requests"], unpack_latency(total.values()["latency"])) == (MOST, {3: MOST})  # type: ignore[arg-type]
    assert {count for _, _, count in unpack_cells(values["confusion"])} == {MOST}  # type: ignore[arg-type]


def test_periods_begin_at_whole_multiples_in_utc() -> None:
    assert period_of(START, HOUR_S) == START.replace(minute=0)
    assert period_of(START, DAY_S) == START.replace(hour=0, minute=0)
    east = START.astimezone(dt.timezone(dt.timedelta(hours=5, minutes=30)))
    assert period_of(east, DAY_S) == START.replace(hour=0, minute=0)
