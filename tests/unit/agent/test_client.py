"""The pure parts of the client: replies of HTTP, sizes of outputs, and where they may go."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.client.again import Again
from agent.client.blocking import Blocking
from agent.client.connection import Link
from agent.client.encoding import Placed, answer_of
from agent.client.errors import ModelFailedError
from agent.client.http1 import ANSWER_LIMIT, HEAD_LIMIT, Ask, Reply, ReplyError, ReplyReader, head
from agent.client.lane import Lane
from agent.client.memory import SharedMemory
from agent.client.sizes import KINDS_LIMIT, MISFITS_MOST, SHARED_FROM, Sizes
from agent.client.waiting import now


def read(content: bytes, *pieces: int) -> Reply | None:
    """What a reader makes of some bytes that come in pieces, the last of them as large as there is room."""
    reader, position, ends = ReplyReader(), 0, iter(pieces)
    while position < len(content) and reader.reply is None:
        room = reader.room()
        size = min(next(ends, len(room)), len(room), len(content) - position)
        room[:size] = content[position : position + size]
        position += size
        reader.came(size)
    return reader.reply


WHOLE = b'HTTP/1.1 400 Bad\r\nContent-Length: 29\r\nRetry-After: 7\r\n\r\n{"error":"no","field":["a"]}\n'


@given(st.lists(st.integers(1, 30), max_size=20))
def test_a_reply_comes_in_pieces_of_any_size(pieces: list[int]) -> None:
    reply = read(WHOLE, *pieces)
    assert reply is not None
    assert (reply.status, reply.field, reply.again_after_s) == (400, ("a",), 7.0)
    assert reply.said == "the inference API answered 400: no"


@pytest.mark.parametrize("end", range(0, len(WHOLE), 7))
def test_a_reply_that_is_not_whole_is_none(end: int) -> None:
    assert read(WHOLE[:end]) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"SSH-2.0-x\r\n\r\n", "does not speak"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "does not speak"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "how long"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "how long"),
        ("HTTP/1.1 200 OK\r\nContent-Length: \u00b2\r\n\r\n".encode("latin-1"), "how long"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "how long"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (ANSWER_LIMIT + 1), "may have"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n" % (b"9" * 9000), "may have"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab", "more came"),
        (b"x" * (HEAD_LIMIT + 1), "the head"),
    ],
)
def test_what_is_no_reply(content: bytes, said: str) -> None:
    with pytest.raises(ReplyError, match=said):
        read(content)


@given(st.binary(max_size=300))
def test_whatever_comes_is_a_reply_or_none(content: bytes) -> None:
    for one in (content, WHOLE[:40] + content, WHOLE[:-29] + content):
        try:
            reply = read(one)
        except ReplyError:
            continue
        if reply is not None:
            assert isinstance(reply.said, str)
            assert isinstance(reply.field, tuple)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"error":1}', b'{"field":[1]}', b"[" * 70000, b"\xff"])
def test_an_error_that_says_nothing(body: bytes) -> None:
    assert (Reply(400, {}, body).field, Reply(400, {}, body).said) == ((), "the inference API answered 400")


def test_a_request() -> None:
    ask = Ask("POST", "/v2", [b"ab", memoryview(b"c")], {"A": "b"})
    assert head(ask) == b"POST /v2 HTTP/1.1\r\nHost: localhost\r\nA: b\r\nContent-Length: 3\r\n\r\n"
    assert b"Length" not in head(Ask("GET", "/v2"))


LARGE, SMALL = SHARED_FROM, SHARED_FROM - 1


def test_outputs_are_large_as_answers_have_shown() -> None:
    sizes = Sizes()
    assert (sizes.large("k"), sizes.outputs("k"), sizes.knows("k", "1")) == ({}, (), False)
    sizes.learn("k", "1", {"a": LARGE, "b": SMALL})
    assert (sizes.large("k"), sizes.outputs("k")) == ({"a": LARGE}, ("a", "b"))
    sizes.learn("k", "1", {"a": LARGE + 1, "b": 0})
    sizes.learn("k", "2", {"b": LARGE, "a": 1})
    assert sizes.large("k") == {"a": LARGE + 1, "b": LARGE}
    assert sizes.knows("k", "1")
    assert sizes.knows("k", "2")
    sizes.learn("k", "3", {"c": LARGE})
    assert (sizes.large("k"), sizes.knows("k", "1"), sizes.knows("k", "3")) == ({"c": LARGE}, False, True)


def test_what_keeps_changing_is_not_expected() -> None:
    sizes = Sizes()
    for number in range(MISFITS_MOST + 1):
        sizes.learn("k", str(number), {str(number % 2): LARGE})
    assert sizes.large("k") == {}
    sizes.learn("other", "1", {"a": LARGE})
    for _ in range(MISFITS_MOST):
        assert sizes.large("other")
        sizes.misfit("other")
    assert sizes.large("other") == {}
    sizes.misfit("unknown")


def test_kinds_are_bounded() -> None:
    sizes = Sizes()
    for number in range(2 * KINDS_LIMIT):
        sizes.learn(number, "1", {"a": LARGE})
    assert [bool(sizes.large(number)) for number in range(2 * KINDS_LIMIT)].count(True) == KINDS_LIMIT
    assert sizes.large(2 * KINDS_LIMIT - 1)


class _Told(Link):
    """An API that answers the same to everything."""

    def __init__(self, body: bytes) -> None:
        super().__init__("", "nowhere", Blocking())
        self.body = body
        self.asked: list[str] = []

    async def ask(self, ask: Ask, until: float | None) -> Reply:
        self.asked.append(ask.path)
        return Reply(200, {}, self.body)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [(b"", True), (b"[]", True), (b'{"writable":true}', True), (b'{"writable":false}', False)],
)
def test_outputs_go_where_the_agent_may_write(tmp_path: Path, body: bytes, outputs: bool) -> None:
    """An agent that does not say is tried."""
    memory = SharedMemory(tmp_path)
    lane = Lane(_Told(body), memory)
    placed = now(lane.place([], {"y": LARGE}, time.monotonic() + 5))
    assert (placed is not None) is outputs
    assert list(tmp_path.iterdir()) == []
    if placed is not None:
        assert placed.outputs == {"y": (0, LARGE)}


def test_a_name_is_used_once_and_the_api_is_told_of_those_it_need_not_know(tmp_path: Path) -> None:
    link = _Told(b"")
    memory = SharedMemory(tmp_path)
    lane = Lane(link, memory)
    names = []
    for size in (LARGE, LARGE, 9 * LARGE):
        placed = now(lane.place([], {"y": size}, time.monotonic() + 5))
        assert placed is not None
        names.append(placed.region)
    assert names[0] == names[1] != names[2]
    memory.abandon()
    assert memory.stale == [names[2]]
    now(lane.close(time.monotonic() + 5))
    asked = [tuple(path.split("/")[-2:]) for path in link.asked]
    assert asked == [
        (names[0], "register"),
        (names[0], "unregister"),
        (names[2], "register"),
        (names[2], "unregister"),
    ]


PLACED = Placed("r", (), {"y": (64, 8)})


@pytest.mark.parametrize(
    ("where", "readable"),
    [
        ({"shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": 64}, True),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 8}, False),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 4, "shared_memory_offset": 64}, False),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 9, "shared_memory_offset": 64}, False),
        ({"shared_memory_region": "r", "shared_memory_byte_size": -8, "shared_memory_offset": 64}, False),
        ({"binary_data_size": 8}, False),
        ({"binary_data_size": -8}, False),
    ],
)
def test_outputs_lie_where_they_were_to_go(where: dict[str, object], readable: bool) -> None:
    output = {"name": "y", "datatype": "FP32", "shape": [2], "parameters": where}
    body = json.dumps({"outputs": [output], "model_version": "3", "id": "i"}).encode()
    if not readable:
        with pytest.raises(ModelFailedError, match="can't be read"):
            answer_of(body, str(len(body)), PLACED, lambda _offset, size: bytearray(size))
        return
    answer = answer_of(body, "", PLACED, lambda _offset, size: bytearray(size))
    assert (answer["y"].tolist(), answer.version, answer.request_id) == ([0, 0], "3", "i")


def test_what_can_not_be_read_is_not_asked_again() -> None:
    with pytest.raises(ModelFailedError, match="can't be read"):
        Again(time.monotonic() + 9).after_failure(ReplyError("no"))
