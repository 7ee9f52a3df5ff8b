"""What the device notes of itself, and what ends again."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

import agent.condition
from agent.condition import OFFLINE_S, RENEW_S, Condition
from agent.protocol.errors import WireErrorCode
from agent.telemetry.spool import Spool
from agent.update.journal import Journal


class Clock:
    def __init__(self) -> None:
        self.steady, self.wall = 100.0, 1e9

    def monotonic(self) -> float:
        return self.steady

    def time(self) -> float:
        return self.wall

    def go(self, seconds: float) -> None:
        self.steady += seconds
        self.wall += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def condition(tmp_path: Path, clock: Clock):
    journal, spool = Journal(tmp_path / "journal.db"), Spool(tmp_path / "spool.db")
    with mock.patch.object(agent.condition, "time", clock):
        yield Condition(journal, spool, "", "state")
    journal.close()
    spool.close()


def codes(condition: Condition) -> list[str]:
    return [one.code for one in condition.reports()]


def test_a_broker_that_was_gone_for_a_week_is_told_of_and_a_short_break_is_not(
    condition: Condition, clock: Clock
) -> None:
    clock.go(60)
    condition.link_up()
    condition.watch(connected=True)
    assert codes(condition) == []
    for _ in range(7 * 24):
        clock.go(3600)
        condition.watch(connected=False)
    condition.link_up()
    (problem,) = condition.reports()
    assert (problem.code, problem.detail) == ("offline", "there was no broker for 168.0 hours")
    assert OFFLINE_S < 168 * 3600


def test_a_clock_that_is_set_is_told_of(condition: Condition, clock: Clock) -> None:
    clock.wall -= 5e8
    condition.watch(connected=False)
    assert codes(condition) == ["clock_set"]


def test_a_worker_that_was_killed_and_one_that_can_not_be_started(condition: Condition) -> None:
    condition.worker_ended(-9)
    condition.worker_ended(1)
    condition.worker_started(OSError(11, "Resource temporarily unavailable"))
    condition.worker_hung("it has not answered for 120 s")
    found = {one.code: one for one in condition.reports()}
    assert "it has not answered for 120 s; it was ended" in found["worker_hung"].detail
    assert [one.detail for one in condition.reports() if "signal 9 (the kernel" in one.detail]
    assert found["worker_not_started"].ongoing
    condition.worker_started(None)
    assert not any(one.ongoing for one in condition.reports())


def test_a_disk_that_is_full_holds_until_it_can_be_written_again(condition: Condition, clock: Clock) -> None:
    condition.storage(WireErrorCode.DISK_FULL, "full")
    assert condition.reports()[0].ongoing
    condition.mend(clock.monotonic())
    assert condition.reports()[0].ongoing
    clock.go(RENEW_S)
    condition.mend(clock.monotonic())
    assert not condition.reports()[0].ongoing


def test_what_is_known_outlives_the_agent(condition: Condition, tmp_path: Path) -> None:
    condition.stands_in("m", "1")
    assert condition.changed
    condition.keep()
    assert not condition.changed
    journal, spool = Journal(tmp_path / "journal.db"), Spool(tmp_path / "spool.db")
    assert codes(Condition(journal, spool, "serving.json can't be read", "state")) == ["stand_in", "journal_lost"]
    journal.close()
    spool.close()


def test_grpc_that_is_not_served_is_told_of_until_it_is(condition: Condition) -> None:
    condition.grpc_served("127.0.0.1:8471", "")
    assert condition.reports() == ()
    for _ in range(2):  # by each worker that is started
        condition.grpc_served("", "gRPC is not served, HTTP is: …")
    (told,) = condition.reports()
    assert (told.code, told.count, told.ongoing) == ("grpc_not_served", 1, True)
    condition.grpc_served("127.0.0.1:8471", "")
    assert [one.ongoing for one in condition.reports()] == [False]
