"""Spans: trace contexts, when devices' steps were by the server's clock, what is forgotten, what is exported."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from agent.protocol.trace import MARKS, SWITCHED, Mark, TraceParent, marked, parse_traceparent
from fleet_server import spans
from fleet_server.cli.main import app
from fleet_server.cli.tracing import command_words
from fleet_server.db import savepoint
from fleet_server.otlp import Targets, targets
from fleet_server.rollouts.tracing import placed

GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_trace_context_is_read_as_w3c_has_it() -> None:
    assert parse_traceparent(GOOD) == TraceParent("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert parse_traceparent(GOOD[:-2] + "00") == TraceParent(*GOOD.split("-")[1:3], sampled=False)
    assert parse_traceparent("01" + GOOD[2:] + "-more") == parse_traceparent(GOOD)
    parsed = parse_traceparent(GOOD)
    assert parsed is not None
    assert parsed.text == GOOD


@pytest.mark.parametrize(
    "text",
    [
        *("", GOOD[1:], GOOD.upper(), GOOD + "-more", "ff" + GOOD[2:], GOOD + "\n", "01" + GOOD[2:] + "-" + "x" * 300),
        *(GOOD.replace(GOOD[3:35], "0" * 32), GOOD.replace(GOOD[36:52], "0" * 16)),
    ],
)
def test_what_is_no_trace_context_counts_for_nothing(text: str) -> None:
    assert parse_traceparent(text) is None


def test_a_phase_that_goes_on_is_one_mark() -> None:
    marks: tuple[tuple[str, float], ...] = ()
    for name, at in [("pending", 1.0), ("pending", 2.0), ("probation", 3.0), (SWITCHED, 4.0), ("probation", 5.0)]:
        marks = marked(marks, name, at)
    assert marks == (("pending", 1.0), ("probation", 3.0), (SWITCHED, 4.0))
    for number in range(100):
        marks = marked(marks, ("loading", "downloading")[number % 2], 10.0 + number)
    assert len(marks) == MARKS
    assert (marks[0], marks[-1]) == (("pending", 1.0), ("downloading", 109.0))


def test_steps_are_where_the_device_says_they_were() -> None:
    assert placed([Mark("a", 5.0), Mark("b", 3.0), Mark("c", 0.5)], sent_at=90.0, now=100.0) == [95.0, 97.0, 99.5]


def test_steps_before_the_deployment_was_sent_move_together() -> None:
    """The report was on its way for 5 s: or else the device would have begun before it was told."""
    assert placed([Mark("a", 15.0), Mark("b", 12.0), Mark("c", 6.0)], sent_at=90.0, now=100.0) == [90.0, 93.0, 99.0]


def test_a_clock_that_was_set_makes_no_step_end_before_it_began() -> None:
    assert placed([Mark("a", 1e9), Mark("b", 3.0), Mark("c", -50.0)], sent_at=90.0, now=100.0) == [90.0, 100.0, 100.0]
    assert placed([Mark("a", 4.0), Mark("b", 6.0), Mark("c", 0.0)], sent_at=90.0, now=100.0) == [96.0, 96.0, 100.0]


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=MARKS),
    st.floats(1e9, 2e9),
    st.floats(0, 1e6),
)
def test_whatever_a_device_says_steps_are_in_order_and_within_what_the_server_knows(
    agos: list[float], sent_at: float, lasted: float
) -> None:
    now = sent_at + lasted
    found = placed([Mark("x", one) for one in agos], sent_at, now)
    assert found == sorted(found)
    assert all(sent_at <= one <= now for one in found)


class _Session:
    """What of a session spans use."""

    def __init__(self) -> None:
        self.info: dict[str, list[spans.Span]] = {}

    def begin_nested(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def span(name: str, ended_at: float | None = 2.0) -> spans.Span:
    return spans.Span(name, "1" * 32, spans.new_span_id(), "", 1.0, ended_at)


def test_what_is_undone_leaves_no_span() -> None:
    session = _Session()
    spans.note(session, span("a"))
    with contextlib.suppress(ValueError), savepoint(session):
        spans.note(session, span("b"))
        int("no number")
    with savepoint(session):
        spans.note(session, span("c", None))
    before = dt.datetime.now(dt.UTC).timestamp()
    first, last = spans.noted(session)
    assert (first.name, first.ended_at, last.name) == ("a", 2.0, "c")
    assert last.ended_at is not None
    assert last.ended_at >= before


@pytest.mark.parametrize(
    ("base", "environment", "metrics", "wanted"),
    [
        (None, {}, False, Targets(traces=False, metrics=False)),
        ("http://c:4318", {}, False, Targets(traces=True, metrics=False, base="http://c:4318")),
        ("http://c:4318", {}, True, Targets(traces=True, metrics=True, base="http://c:4318")),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False, Targets(traces=True, metrics=False)),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, False, Targets(traces=True, metrics=False)),
        (None, {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c"}, False, Targets(traces=False, metrics=True)),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_METRICS_EXPORTER": "otlp"}, False,
         Targets(traces=True, metrics=True)),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, True,
         Targets(traces=False, metrics=True)),
        ("http://c", {"OTEL_SDK_DISABLED": "true"}, True, Targets(traces=False, metrics=False)),
        (None, {"OTEL_METRICS_EXPORTER": "otlp"}, True, Targets(traces=False, metrics=False)),
    ],
)  # fmt: skip
def test_what_is_exported_is_said_by_setting_and_by_opentelemetrys_variables(
    base: str | None, environment: dict[str, str], metrics: bool, wanted: Targets
) -> None:
    assert targets(base, environment, metrics=metrics) == wanted


def test_an_address_of_the_setting_is_a_collectors_and_not_a_signals() -> None:
    assert Targets(traces=True, metrics=True, base="http://c:4318/").of("traces") == "http://c:4318/v1/traces"
    assert Targets(traces=True, metrics=True).of("metrics") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rollout", "create", "secret@1", "--all"], ["rollout", "create"]),
        (["--url", "http://x", "device", "show", "camera-1"], ["device", "show"]),
        (["login", "ada"], ["login"]),
        (["nonsense", "create"], []),
        ([], []),
    ],
)
def test_a_commands_span_is_named_by_nothing_that_people_made_up(arguments: Sequence[str], words: list[str]) -> None:
    assert command_words(arguments, get_command(app)) == words
