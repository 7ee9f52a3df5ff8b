"""A head that came before is not parsed again: whoever is asked hears the same as if it were."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.serving import incoming
from agent.serving.buffers import Buffers
from agent.serving.clients import Clients
from agent.serving.connection import Connection
from agent.serving.exchange import Answer, Request
from agent.serving.same_head import SameHead, same_head

Heard = tuple[str, str, dict[str, str], bytes, bool]


class Listener:
    """Answers at once, and notes what it was asked."""

    def __init__(self) -> None:
        self.draining = False
        self.clients = Clients()
        self.buffers = Buffers()
        self.heard: list[Heard] = []

    async def answer(self, request: Request) -> Answer:
        return self.note(request)

    def answer_soon(self, request: Request, say: Callable[[Answer | None], None], *, alone: bool) -> bool:
        if "later" in request.path:
            return False
        say(self.note(request))
        return True

    def note(self, request: Request) -> Answer:
        one = (request.method, request.path, dict(request.headers), bytes(request.body), request.keep_alive)
        self.heard.append(one)
        return Answer(200, b"%d" % len(self.heard))


class Wire(asyncio.Transport):
    """What a connection is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.said, self.closed, self.reads = b"", False, True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.said += bytes(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


def asked(pieces: list[bytes], *, remembers: bool) -> tuple[list[Heard], bytes, bool, int]:
    """What is heard and said of bytes that come in pieces, and how many requests were not parsed."""

    async def run() -> tuple[list[Heard], bytes, bool]:
        listener, wire = Listener(), Wire()
        one = Connection(listener)
        one.connection_made(wire)
        for piece in pieces:
            done = 0
            while done < len(piece) and not wire.closed:
                room = one.get_buffer(-1)
                count = min(len(room), len(piece) - done)
                room[:count] = piece[done : done + count]
                one.buffer_updated(count)
                done += count
                await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        one.connection_lost(None)
        await asyncio.sleep(0)
        assert listener.clients.hold(listener.clients.bytes_allowed), "nothing is held any more"
        return listener.heard, wire.said, wire.closed

    again = 0

    def begun(self: SameHead, came: bytearray, count: int) -> bool:
        nonlocal again
        found = begins(self, came, count)
        again += found
        return found

    begins = SameHead.begins
    with (
        mock.patch.object(incoming, "same_head", same_head if remembers else lambda *_: None),
        mock.patch.object(SameHead, "begins", begun),
    ):
        return *asyncio.run(run()), again


def post(path: str, body: bytes, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", *headers, f"Content-Length: {len(body)}", "", ""]).encode() + body


BODIES = [b"", b"a", b"POST /x HTTP/1.1\r\n\r\n", b"b" * 700, b"c" * 16_384, b"d" * 40_000]
HEADERS = ["X: 1", "X:  2 ", "Inference-Header-Content-Length: 1"]
REQUESTS = st.one_of(
    st.builds(post, st.sampled_from(["/a", "/later"]), st.sampled_from(BODIES)),
    st.builds(post, st.just("/b"), st.sampled_from(BODIES), st.sampled_from(HEADERS)),
    st.sampled_from(
        [
            b"GET / HTTP/1.1\r\nHost: d\r\n\r\n",
            b"\r\n\r\nPOST /a HTTP/1.1\r\nContent-Length: 1\r\n\r\na",
            b"POST /a HTTP/1.1\nContent-Length: 4\n\nAB\r\n\r\n",
            b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
            b"POST /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\na",
            b"POST /a HTTP/1.1\r\nConnection: close\r\nContent-Length: 1\r\n\r\na",
            b"POST /a HTTP/1.0\r\nContent-Length: 1\r\n\r\na",
            b"POST /a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            b"POST /a HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\na",
            b"POST /a HTTP/1.1\r\n\r\n",
        ]
    ),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(REQUESTS, st.integers(1, 4)), min_size=1, max_size=5),
    st.lists(st.integers(1, 40_000), max_size=6),
    st.booleans(),
)
def test_what_is_heard_and_said_is_the_same_however_it_is_cut(
    wanted: list[tuple[bytes, int]], cuts: list[int], together: bool
) -> None:
    requests = [one for one, times in wanted for _ in range(times)]
    pieces = [b"".join(requests)] if together else requests
    for cut in cuts:
        pieces = [part for piece in pieces for part in ((piece[:cut], piece[cut:]) if len(piece) > cut else (piece,))]
    *found, _ = asked(pieces, remembers=True)
    *parsed, _ = asked(pieces, remembers=False)
    assert found == parsed


@pytest.mark.parametrize("size", [0, 10, 16_384, 100_000])
def test_the_same_head_is_parsed_once(size: int) -> None:
    requests = [post("/a", bytes([number]) * size) for number in range(5)]
    heard, _, _, again = asked(requests, remembers=True)
    assert [body for _, _, _, body, _ in heard] == [bytes([number]) * size for number in range(5)]
    assert again == 4
