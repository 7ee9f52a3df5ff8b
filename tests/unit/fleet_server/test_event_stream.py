"""Server-sent events read line by line, as a server sends them and cut off anywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fleet_server.sdk.event_stream import ServerEvent, read_events

STREAM = 'id: 1\nevent: line\ndata: {"a": 1}\n\n: nothing new\n\ndata: x\ndata:y\n\nid: 3\n\nevent: end\ndata: {}\n\n'
EVENTS = [ServerEvent("line", '{"a": 1}', "1"), ServerEvent("message", "x\ny", ""), ServerEvent("end", "{}", "")]


def test_events_are_read() -> None:
    assert list(read_events(STREAM.split("\n"))) == EVENTS


@given(st.integers(0, len(STREAM)))
def test_what_is_cut_off_is_a_beginning_of_it(end: int) -> None:
    found = list(read_events(STREAM[:end].split("\n")[:-1]))
    assert found == EVENTS[: len(found)]
