"""When devices that are behind are told again."""

from __future__ import annotations

from fleet_server.domain.reminders import AT_ONCE, Behind


def test_after_a_minute_and_then_less_and_less_often() -> None:
    behind = Behind()
    told = [now for now in range(0, 4000, 20) if behind.due({"a": 3}, now) == ["a"]]
    assert told == [60, 180, 420, 900, 1800, 2700, 3600]


def test_a_new_revision_and_one_that_caught_up_begin_anew() -> None:
    behind = Behind()
    assert behind.due({"a": 3, "b": 1}, 0) == []
    assert behind.due({"a": 4, "b": 1}, 50) == []
    assert behind.due({"a": 4, "b": 1}, 60) == ["b"]
    assert behind.due({"a": 4}, 110) == ["a"]
    assert behind.due({"b": 1}, 120) == []
    assert behind.due({"b": 1}, 180) == ["b"]


def test_not_all_at_once() -> None:
    behind = Behind()
    late = {f"d{number:04}": 1 for number in range(AT_ONCE + 100)}
    assert behind.due(late, 0) == []
    first = behind.due(late, 60)
    second = behind.due(late, 80)
    assert (len(first), len(second)) == (AT_ONCE, 100)
    assert set(first) | set(second) == set(late)
