"""Whatever devices do, each row is answered once, in order; no part is lost, and what is under way stays bounded."""

from __future__ import annotations

import heapq
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_server.domain.inference import Lane, Schedule, Sending, Speeds

FATES = ("answers", "dies", "garbage", "refuses", "late", "silent", "too_large")


def lanes(count: int) -> list[Lane]:
    return [Lane(f"lane-{one}", (f"d-{one}",)) for one in range(count)]


class World:
    """Devices in a clock of their own, each of which works off what it is sent one after another."""

    def __init__(self, schedule: Schedule, row_s: dict[str, float], fates: dict[str, list[str]]) -> None:
        self.schedule = schedule
        self.row_s = row_s
        self.fates = fates
        self.now = 0.0
        self.free_at = dict.fromkeys(row_s, 0.0)
        self.coming: list[tuple[float, int, str, Sending]] = []
        self.spans: list[tuple[int, int]] = []
        self.most_under_way = 0
        self.sent = 0

    def deliver(self, sending: Sending) -> None:
        self.sent += 1
        lane = sending.lane.id
        fates = self.fates.get(lane) or ["answers"]
        fate = fates.pop(0) if len(fates) > 1 else fates[0]
        self.free_at[lane] = max(self.free_at[lane], self.now) + (sending.last - sending.first) * self.row_s[lane]
        at = self.free_at[lane] + (30.0 if fate == "late" else 0.0)
        if fate == "refuses":
            at = self.now + 0.001
        if fate != "silent":
            heapq.heappush(self.coming, (at, sending.id, fate, sending))

    def run(self, until: float = 3600.0) -> bool:
        schedule = self.schedule
        while not schedule.done and not schedule.stuck and self.now < until:
            for sending in schedule.send(self.now):
                self.deliver(sending)
            self.most_under_way = max(
                self.most_under_way, max((len(one.under_way) for one in schedule._lanes.values()), default=0)
            )
            wake = min(schedule.wake_at(), self.coming[0][0] if self.coming else math.inf)
            if wake == math.inf:
                assert schedule.stuck, "nothing is waited for, and rows have no answer"
                break
            self.now = max(self.now + 1e-6, wake)
            while self.coming and self.coming[0][0] <= self.now:
                _, number, fate, sending = heapq.heappop(self.coming)
                self.hear(number, fate, sending)
        return schedule.done

    def hear(self, number: int, fate: str, sending: Sending) -> None:
        schedule = self.schedule
        if schedule.lane_of(number) is None:
            assert schedule.take(number, self.now) is None
            return
        if fate in {"answers", "late"}:
            for _ in range(2):  # each answer comes twice
                span = schedule.take(number, self.now)
                if span is not None:
                    self.spans.append(span)
        elif fate == "dies":
            schedule.gone(sending.lane.devices[0])
        elif fate == "garbage":
            schedule.leave_out(sending.lane.id, "garbage")
        elif fate == "refuses":
            schedule.refuse(number, self.now, 0.05)
        elif fate == "too_large" and not schedule.divide(number):
            span = schedule.take(number, self.now)  # a single row does fit
            if span is not None:
                self.spans.append(span)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 400),
    most_rows=st.integers(1, 64),
    speeds=st.lists(st.floats(0.0005, 0.5), min_size=1, max_size=5),
    data=st.data(),
)
def test_every_row_once_whatever_devices_do(
    rows: int, most_rows: int, speeds: list[float], data: st.DataObject
) -> None:
    names = lanes(len(speeds))
    fates = {
        # The first one ends well at last: else no answer is the right end.
        one.id: [*data.draw(st.lists(st.sampled_from(FATES), max_size=6)), "answers"]
        for one in names
    }
    fates["lane-0"] = [one for one in fates["lane-0"] if one not in {"dies", "garbage"}]
    schedule = Schedule(rows, names, Speeds(), most_rows=most_rows)
    world = World(schedule, {one.id: speed for one, speed in zip(names, speeds, strict=True)}, fates)
    assert world.run()
    covered = sorted(world.spans)
    assert covered[0][0] == 0
    assert covered[-1][1] == rows
    assert all(a[1] == b[0] for a, b in pairwise(covered))
    assert all(last - first <= most_rows for first, last in covered)
    assert world.most_under_way <= 2
    assert sum(one.rows for one in schedule.report()) == rows


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 200), count=st.integers(1, 4), dies=st.booleans())
def test_it_says_when_no_device_is_left(rows: int, count: int, dies: bool) -> None:
    schedule = Schedule(rows, lanes(count), Speeds(), most_rows=1000)
    fate = "dies" if dies else "garbage"
    world = World(
        schedule, {f"lane-{one}": 0.01 for one in range(count)}, {f"lane-{one}": [fate] for one in range(count)}
    )
    assert not world.run()
    assert schedule.stuck
    assert all(one.out for one in schedule.report())


def known(row_s: list[float]) -> Speeds:
    speeds = Speeds()
    for number, one in enumerate(row_s):
        speeds.learn(f"lane-{number}", 100, 100 * one, idle=False)
    return speeds


def took(row_s: list[float], rows: int, fates: dict[str, list[str]] | None = None) -> float:
    schedule = Schedule(rows, lanes(len(row_s)), known(row_s), most_rows=10_000)
    world = World(schedule, {f"lane-{number}": one for number, one in enumerate(row_s)}, fates or {})
    assert world.run()
    return world.now


def test_devices_of_equal_speed_share_alike() -> None:
    assert took([0.01] * 4, 4000) == pytest.approx(took([0.01], 4000) / 4, rel=0.03)


@pytest.mark.parametrize("row_s", [[0.01, 0.02], [0.002, 0.01, 0.05], [0.001, 0.3]])
def test_a_slow_device_helps_as_much_as_it_can(row_s: list[float]) -> None:
    rate = sum(1 / one for one in row_s)
    assert took(row_s, 4000) <= 1.08 * 4000 / rate + 0.05


def test_a_device_that_dies_costs_what_it_would_have_done() -> None:
    fates = {"lane-3": ["answers"] * 10 + ["dies"]}
    assert took([0.01] * 4, 4000, fates) <= took([0.01] * 3, 4000) * 1.03


def test_a_straggler_is_asked_of_another_near_the_end() -> None:
    speeds = known([0.01, 0.01])
    schedule = Schedule(100, lanes(2), speeds, most_rows=50)
    world = World(schedule, {"lane-0": 0.01, "lane-1": 2.0}, {})  # it was fast until now
    assert world.run()
    assert schedule.reissued
    assert world.now < 5


def test_a_device_that_refuses_is_left_in_peace_for_as_long_as_it_says() -> None:
    schedule = Schedule(10, lanes(1), known([0.01]), most_rows=100)
    first = schedule.send(0.0)
    schedule.refuse(first[0].id, 0.0, 7.0)
    for one in first[1:]:
        schedule.refuse(one.id, 0.0, 7.0)
    assert not schedule.send(6.9)
    assert schedule.wake_at() >= 7.0
    assert schedule.send(schedule.wake_at())


def test_a_lane_that_is_lost_leaves_its_rows_to_the_one_that_comes() -> None:
    route = Lane("old", ("d-0", "d-1"), in_flight=4)
    schedule = Schedule(100, [route], Speeds(), most_rows=10)
    first, *_ = schedule.send(0.0)
    assert schedule.take(first.id, 0.1) == (first.first, first.last)
    assert schedule.send(0.1)
    schedule.gone("d-1")
    assert schedule.stuck
    assert schedule.send(0.2) == []
    schedule.add(Lane("new", ("d-0", "d-2"), in_flight=4))
    assert not schedule.stuck
    now, rows = 0.3, []
    while not schedule.done:
        for sending in schedule.send(now):
            assert sending.lane.id == "new"
            rows.append(schedule.take(sending.id, now + 0.1))
        now += 0.2
    assert sum(last - begin for begin, last in filter(None, rows)) == 100 - (first.last - first.first)
    assert [(one.lane.id, bool(one.out)) for one in schedule.report()] == [("old", True), ("new", False)]
