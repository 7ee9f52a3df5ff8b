"""Chunks over HTTP, from servers that are right, and from such as lie, dawdle, redirect, or know no ranges."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from agent.protocol.manifest import DataFile
from agent.protocol.messages import ChunkRange
from agent.update import http_source
from agent.update.http_source import read_http
from agent.update.transfer import Address, SourceError, Stop

CONTENT = bytes(range(100))
FILE = DataFile(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), 32)
ALL = (ChunkRange(0, 3),)


class Request:
    def __init__(self, head: bytes) -> None:
        lines = head.decode().split("\r\n")
        self.path = lines[0].split()[1]
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        first, _, last = self.headers["range"].removeprefix("bytes=").partition("-")
        self.first, self.last = int(first), int(last)

    def part(self, content: bytes = CONTENT) -> bytes:
        body = content[self.first : self.last + 1]
        span = f"Content-Range: bytes {self.first}-{self.last}/{len(content)}"
        return f"HTTP/1.1 206 P\r\n{span}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


Answer = Callable[[Request], bytes | Iterator[bytes]]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """Answers every connection's first request with whatever bytes a test wants."""
    asked: list[Request] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(4096)
                if not piece:
                    return
                head += piece
            asked.append(Request(head[:-4]))
            said = answer(asked[-1])
            try:
                for one in [said] if isinstance(said, bytes) else said:
                    connection.sendall(one)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/a?x=1"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def read(url: str, spans: tuple[ChunkRange, ...] = ALL, ticket: str = "", *, plain: bool = True) -> dict[int, bytes]:
    return dict(read_http(Address(url, ticket, plain=plain), FILE, spans, Stop()))


def whole(content: bytes = CONTENT, *, length: int | None = None) -> bytes:
    said = len(content) if length is None else length
    return f"HTTP/1.1 200 OK\r\nContent-Length: {said}\r\n\r\n".encode() + content


def refused(answer: Answer, match: str) -> SourceError:
    with server(answer) as url, pytest.raises(SourceError, match=match) as caught:
        read(url)
    return caught.value


def test_what_is_missing_comes_as_chunks() -> None:
    with server(lambda request: request.part()) as url:
        assert b"".join(read(url).values()) == CONTENT
        assert read(url, (ChunkRange(1, 1), ChunkRange(3, 3))) == {1: CONTENT[32:64], 3: CONTENT[96:]}


def test_a_server_without_ranges_sends_all_once() -> None:
    asked: list[Request] = []

    def answer(request: Request) -> bytes:
        asked.append(request)
        return whole()

    with server(answer) as url:
        found = read(url, (ChunkRange(1, 1), ChunkRange(3, 3)))
    assert b"".join(found.values()) == CONTENT
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("head", "match"),
    [
        ("206 P\r\nContent-Range: bytes 0-98/100\r\nContent-Length: 99", "another range"),
        ("206 P\r\nContent-Range: bytes 0-99/101\r\nContent-Length: 100", "another range"),
        ("206 P\r\nContent-Length: 100", "another range"),
        ("206 P\r\nContent-Range: bytes 0-99/100\r\nContent-Length: 5000000000", "announces"),
        ("200 OK\r\nContent-Length: 99", "99 bytes under this name"),
        ("200 OK\r\nContent-Length: 100\r\nContent-Encoding: gzip", "encodes"),
        ("401 No\r\nContent-Length: 0", "answered 401"),
        ("503 Busy\r\nContent-Length: 0", "answered 503"),
        ("302 Found\r\nContent-Length: 0", "answered 302"),
        ("two hundred", "127.0.0.1"),
    ],
)
def test_lies_of_the_head_are_refused(head: str, match: str) -> None:
    refused(lambda _: f"HTTP/1.1 {head}\r\n\r\n".encode() + CONTENT, match)


def test_what_it_does_not_have_is_no_failure() -> None:
    assert refused(lambda _: b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "does not have it").absent
    assert not refused(lambda _: b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", "500").absent


def test_a_cut_leaves_what_came() -> None:
    found: list[int] = []
    with server(lambda request: request.part()[:-30]) as url:
        reading = read_http(Address(url, plain=True), FILE, ALL, Stop())
        with pytest.raises(SourceError):
            found.extend(index for index, _ in reading)
    assert found == [0, 1]


def test_endless_bodies_end() -> None:
    refused(lambda _: b"HTTP/1.1 200 OK\r\n\r\n" + CONTENT * 1000, "more bytes")


def test_a_body_that_trickles_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_source, "CHUNK_S", 0.3)

    def answer(request: Request) -> Iterator[bytes]:
        yield b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-99/100\r\nContent-Length: 100\r\n\r\n"
        for byte in CONTENT:
            yield bytes([byte])
            time.sleep(0.05)

    refused(answer, "longer than")


def test_a_head_that_trickles_ends_when_it_is_cancelled() -> None:
    def answer(request: Request) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n"
        while True:
            yield b"a: b\r\n"
            time.sleep(0.05)

    stop = Stop()
    threading.Timer(0.2, stop.set).start()
    with server(answer) as url, pytest.raises(SourceError):
        list(read_http(Address(url, plain=True), FILE, ALL, stop))
    with server(lambda request: request.part()) as url, pytest.raises(SourceError, match="not wanted"):
        list(read_http(Address(url, plain=True), FILE, ALL, stop))


def test_redirects_are_followed_a_few_times_and_tickets_stay_at_home() -> None:
    seen: list[tuple[str, str | None]] = []

    def target(request: Request) -> bytes:
        seen.append((request.path, request.headers.get("authorization")))
        return request.part()

    with server(target) as there:

        def answer(request: Request) -> bytes:
            seen.append((request.path, request.headers.get("authorization")))
            location = "/b" if request.path != "/b" else there
            return f"HTTP/1.1 307 T\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()

        with server(answer) as url:
            assert b"".join(read(url, ticket="secret").values()) == CONTENT
            assert seen == [("/a?x=1", "Bearer secret"), ("/b", "Bearer secret"), ("/a?x=1", None)]
            with pytest.raises(SourceError, match="only https"):
                read(url, plain=False)
    refused(lambda _: b"HTTP/1.1 301 M\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n", "more than 3 times")
    refused(lambda _: b"HTTP/1.1 301 M\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n", "only https")


def test_nobody_there_is_a_failure() -> None:
    with server(lambda _: b"") as url:
        pass
    with pytest.raises(SourceError, match="http://"):
        read(url)
