"""When alerts begin and end, and when routes are told: pure."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fleet_server.alerts.schemas import RouteSpec, RuleSpec
from fleet_server.domain.alerting import (
    KINDS,
    UNKNOWN_S,
    AlertState,
    Bounds,
    Metric,
    Of,
    Patience,
    Reading,
    Severity,
    Standing,
    look,
    step,
)
from fleet_server.domain.notifying import Timing, Told, due, repeats

START = dt.datetime(2026, 11, 29, tzinfo=dt.UTC)
HOLDS, BETWEEN, CLEAR, UNKNOWN = Reading.HOLDS, Reading.BETWEEN, Reading.CLEAR, Reading.UNKNOWN
PENDING, FIRING, RESOLVED = AlertState.PENDING, AlertState.FIRING, AlertState.RESOLVED


def at(seconds: float) -> dt.datetime:
    return START + dt.timedelta(seconds=seconds)


def walk(patience: Patience, *looks: tuple[float, Reading]) -> list[AlertState | None]:
    """The states after each look."""
    standing: Standing | None = None
    states = []
    for seconds, reading in looks:
        standing = step(standing, reading, patience, at(seconds))
        states.append(standing.state if standing else None)
    return states


def test_what_holds_for_long_enough_fires_and_resolves_when_it_is_over() -> None:
    looks = [(0, CLEAR), (10, HOLDS), (60, HOLDS), (70, HOLDS), (80, HOLDS), (90, CLEAR)]
    assert walk(Patience(for_s=60), *looks) == [None, PENDING, PENDING, FIRING, FIRING, RESOLVED]
    assert walk(Patience(), (0, HOLDS), (1, CLEAR)) == [FIRING, RESOLVED]


@pytest.mark.parametrize("reading", [BETWEEN, CLEAR, UNKNOWN])
def test_what_is_pending_comes_to_nothing_and_begins_anew(reading: Reading) -> None:
    looks = [(0, HOLDS), (50, reading), (60, HOLDS), (110, HOLDS), (120, HOLDS)]
    assert walk(Patience(for_s=60), *looks) == [PENDING, None, PENDING, PENDING, FIRING]


def test_what_hovers_between_threshold_and_clear_goes_on_firing() -> None:
    looks = [(0, HOLDS), (10, BETWEEN), (20, BETWEEN), (30, CLEAR)]
    assert walk(Patience(), *looks) == [FIRING, FIRING, FIRING, RESOLVED]
    assert walk(Patience(), (0, BETWEEN)) == [None], "and does not begin there"


def test_it_must_be_well_for_as_long_as_the_rule_says() -> None:
    looks = [(0, HOLDS), (10, CLEAR), (20, HOLDS), (30, CLEAR), (80, CLEAR), (90, CLEAR)]
    assert walk(Patience(keep_s=60), *looks) == [FIRING, FIRING, FIRING, FIRING, FIRING, RESOLVED]


def test_of_what_nothing_is_known_it_is_not_said_that_it_is_well() -> None:
    looks = [(0, HOLDS), (10, UNKNOWN), (10 + UNKNOWN_S - 1, UNKNOWN), (10 + UNKNOWN_S, UNKNOWN)]
    assert walk(Patience(), *looks) == [FIRING, FIRING, FIRING, RESOLVED]
    assert walk(Patience(), (0, HOLDS), (10, UNKNOWN), (20, CLEAR))[-1] is RESOLVED


def test_what_resolved_stays_so() -> None:
    over = Standing(RESOLVED, at(0))
    assert step(over, HOLDS, Patience(), at(9)) == over


READINGS = st.lists(st.tuples(st.floats(0.1, 1000), st.sampled_from(Reading)), max_size=40)


@given(READINGS, st.floats(0, 500), st.floats(0, 500))
def test_nothing_fires_that_did_not_hold_all_the_time(
    looks: list[tuple[float, Reading]], for_s: float, keep_s: float
) -> None:
    standing, now, held = None, 0.0, None
    for seconds, reading in looks:
        now += seconds
        held = (now if held is None else held) if reading is HOLDS else None
        before, standing = standing, step(standing, reading, Patience(for_s, keep_s), at(now))
        if standing is not None and standing.state is FIRING and (before is None or before.state is PENDING):
            assert held is not None
            assert now - held >= for_s - 1e-3
        if standing is not None and standing.state is RESOLVED:
            assert reading in {CLEAR, UNKNOWN}
            standing = None


def test_a_look_moves_each_subject_by_itself_and_says_only_what_moved() -> None:
    known = {"a": Standing(PENDING, at(0)), "b": Standing(FIRING, at(0)), "c": Standing(FIRING, at(0))}
    readings = {"a": HOLDS, "b": HOLDS, "d": HOLDS, "e": CLEAR}
    moves = {one.subject: one.after for one in look(known, readings, Patience(for_s=60), at(60), others=CLEAR)}
    assert {name: one.state if one else None for name, one in moves.items()} == {
        "a": FIRING, "c": RESOLVED, "d": PENDING,
    }  # fmt: skip
    gone = look({"a": Standing(PENDING, at(0))}, {}, Patience(), at(1), others=UNKNOWN)
    assert [(one.subject, one.after) for one in gone] == [("a", None)]


def test_bounds() -> None:
    high, low = Bounds(90, 80), Bounds(500, 700, below=True)
    assert [high.read(one) for one in (91, 90, 81, 80)] == [HOLDS, BETWEEN, BETWEEN, CLEAR]
    assert [low.read(one) for one in (499, 500, 699, 700)] == [HOLDS, BETWEEN, BETWEEN, CLEAR]
    assert Bounds(1).read(1) is CLEAR


def test_severities_have_an_order() -> None:
    assert [one.covers(Severity.WARNING) for one in Severity] == [False, True, True]


def test_a_burst_is_told_once_and_what_comes_later_not_at_once() -> None:
    timing = Timing(wait_s=30, interval_s=300, repeat_s=3600)
    first = Told(None, at(0))
    assert [due(first, timing, at(one)) for one in (0, 29, 30)] == [False, False, True]
    again = Told(at(30), at(40))
    assert [due(again, timing, at(one)) for one in (70, 329, 330)] == [False, False, True]
    assert not due(Told(at(30), None), timing, at(9999))


def test_what_still_fires_is_told_again_unless_there_is_news() -> None:
    timing = Timing(repeat_s=3600)
    assert [repeats(Told(at(0)), timing, at(one)) for one in (3599, 3600)] == [False, True]
    assert not repeats(Told(at(0), at(10)), timing, at(3600))
    assert not repeats(Told(), timing, at(3600))
    assert not repeats(Told(at(0)), Timing(repeat_s=0), at(10**9))


def rule(**fields: object) -> RuleSpec:
    return RuleSpec.model_validate({"metric": "temperature_c", "threshold": 80, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"threshold": None}, "threshold"),
        ({"clear": 90}, "clear"),
        ({"metric": "disk_free_mb", "clear": 70}, "clear"),
        ({"below": True, "clear": 70}, "clear"),
        ({"metric": "offline"}, "threshold"),
        ({"window_s": 60}, "window_s"),
        ({"model": "m"}, "model"),
        ({"metric": "rollout_stuck_s", "query": "site==a"}, "query"),
        ({"for_s": -1}, "for_s"),
        ({"threshold": float("nan")}, "threshold"),
        ({"thresold": 1}, "thresold"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_the_field(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        rule(**fields)


def test_every_metric_makes_a_rule() -> None:
    for metric, kind in KINDS.items():
        spec = rule(metric=metric, threshold=1 if kind.counted else None)
        assert (spec.bounds is None) == (not kind.counted)
        assert spec.low == kind.below
    assert set(KINDS) == set(Metric)
    assert {one.of for one in KINDS.values()} == set(Of)


def test_routes_want_what_is_severe_enough_and_named() -> None:
    route = RouteSpec.model_validate({"kind": "mqtt", "least_severity": "warning", "rules": ["offline"]})
    assert route.wants("offline", Severity.CRITICAL)
    assert not route.wants("offline", Severity.INFO)
    assert not route.wants("drift", Severity.CRITICAL)
    assert not route.model_copy(update={"enabled": False}).wants("offline", Severity.CRITICAL)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "email"},
        {"kind": "mqtt", "to": ["a@b.c"]},
        {"kind": "email", "to": ["a b@c"]},
        {"kind": "email", "to": ["a@b.c\n"]},
        {"kind": "email", "to": ["a@b.c\nBcc: x@y.z"]},
    ],
)
def test_a_route_has_addresses_that_are_some(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="to"):
        RouteSpec.model_validate(fields)
