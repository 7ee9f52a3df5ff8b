"""Which bytes a Range header means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol.ranges import BeyondEndError, content_range, parse_content_range, wanted_range


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("bytes=0-0", (0, 1)), ("bytes=2-5", (2, 4)), ("bytes=2-", (2, 8)), ("bytes=-3", (7, 3)),
        ("bytes=-99", (0, 10)), ("bytes=8-99", (8, 2)), ("bytes=5-2", None), ("bytes=-", None),
        ("bytes=0-1,3-4", None), ("items=0-1", None), ("bytes=²-3", None), ("", None),
    ],
)  # fmt: skip
def test_what_is_asked_for(header: str, found: tuple[int, int] | None) -> None:
    assert wanted_range({"range": header}, '"e"', 10) == found


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=10-11", "bytes=-0", "bytes=9999999999999999999-"])
def test_beyond_the_end(header: str) -> None:
    with pytest.raises(BeyondEndError):
        wanted_range({"range": header}, '"e"', 10)


def test_a_range_of_something_else_is_none() -> None:
    assert wanted_range({"range": "bytes=1-2", "if-range": '"e"'}, '"e"', 10) == (1, 2)
    assert wanted_range({"range": "bytes=1-2", "if-range": '"other"'}, '"e"', 10) is None


@given(st.text(max_size=40), st.integers(0, 1 << 40))
def test_whatever_is_sent_stays_inside(header: str, size: int) -> None:
    try:
        found = wanted_range({"range": f"bytes={header}"}, '"e"', size)
    except BeyondEndError:
        return
    if found is not None:
        start, count = found
        assert 0 <= start < start + count <= size
        assert parse_content_range(content_range(start, count, size)) == (start, count, size)


@pytest.mark.parametrize("text", ["bytes 5-2/10", "bytes */10", "bytes 0-1", "", "bytes 0-1/x"])
def test_a_header_that_is_none(text: str) -> None:
    assert parse_content_range(text) is None
