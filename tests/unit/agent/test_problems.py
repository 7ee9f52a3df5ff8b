"""Problems are bounded, counted and kept; a clock that is set is noticed, one that drifts is not."""

from __future__ import annotations

from agent.problems import ClockWatch, Problems
from agent.protocol.limits import LIMITS


def test_the_same_thing_again_is_counted_and_what_holds_is_one() -> None:
    problems = Problems()
    problems.note("worker_ended", "it died", 10.0, subject="-9")
    problems.note("worker_ended", "it died", 20.0, subject="-9")
    problems.note("disk_full", "full", 30.0, ongoing=True)
    problems.changed = False
    problems.note("disk_full", "still full", 40.0, ongoing=True)
    assert not problems.changed
    problems.note("disk_full", "quite full", 40.0, ongoing=True, retold=True)
    assert problems.changed
    problems.changed = False
    died, full = problems.reports()
    assert (died.count, died.first_at, died.last_at) == (2, 10.0, 20.0)
    assert (full.count, full.first_at, full.last_at, full.ongoing) == (1, 30.0, 40.0, True)
    problems.over("disk_full")
    assert problems.changed
    assert not problems.reports()[1].ongoing
    problems.note("disk_full", "full again", 50.0, ongoing=True)
    assert problems.reports()[1].count == 2


def test_only_the_newest_stay_and_no_text_is_too_long() -> None:
    problems = Problems()
    for number in range(100):
        problems.note("stand_in", "x" * 10_000 + "\0", -5.0, subject=f"model-{number}")
    found = problems.reports()
    assert len(found) == LIMITS.problems
    assert all(len(one.detail) <= LIMITS.detail_chars and one.first_at == 0.0 for one in found)


def test_they_are_kept_and_what_held_has_to_show_itself_anew() -> None:
    problems = Problems()
    problems.note("store_error", "read-only", 1.0, ongoing=True)
    problems.note("journal_lost", "damaged", 2.0)
    again = Problems(problems.packed())
    assert [one.code for one in again.reports()] == ["store_error", "journal_lost"]
    assert not any(one.ongoing for one in again.reports())
    assert Problems(b"{damaged").reports() == ()


def test_a_clock_that_is_set() -> None:
    watch = ClockWatch(1000.0, 5.0)
    assert watch.tick(1100.5, 105.0) == 0.0
    assert watch.tick(1100.5 + 3600.0, 105.0) == 3600.5
    assert watch.tick(1100.5 + 3600.0, 105.0) == 0.0
    assert watch.tick(10.0, 105.0) < -1000
