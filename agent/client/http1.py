"""HTTP/1.1 as a client of the local inference API speaks it: requests to bytes, and bytes to replies. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

import msgspec

HEAD_LIMIT = 16 << 10
ANSWER_LIMIT = 64 << 20
FIELD_PARTS = 16
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: |$)")
Content = bytes | bytearray | memoryview
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class ReplyError(OSError):
    """What came is no reply, or too large."""


class Ask(msgspec.Struct, frozen=True):
    """A request.

    Attributes:
        method: of HTTP.
        path: with the query.
        body: its parts in their order.
        headers: beside those that are there anyway.
    """

    method: str
    path: str
    body: Sequence[Content] = ()
    headers: Mapping[str, str] = NO_HEADERS


class _Said(msgspec.Struct):
    error: str = ""
    field: list[str] = []


class Reply(msgspec.Struct, frozen=True):
    """What the API answered.

    Attributes:
        status: of HTTP.
        headers: by their names in small letters.
        body: whole.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray

    @property
    def said(self) -> str:
        """The error in words."""
        text = self._error().error
        return f"the inference API answered {self.status}{': ' if text else ''}{text[:500]}"

    @property
    def field(self) -> tuple[str, ...]:
        """The field at fault, where it names one."""
        return tuple(self._error().field[:FIELD_PARTS])

    @property
    def again_after_s(self) -> float:
        """When it asks to be asked again, in seconds; 0 where it does not say."""
        wait = self.headers.get("retry-after", "")
        return float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 6 else 0.0

    def _error(self) -> _Said:
        try:
            return msgspec.json.decode(self.body[:65536], type=_Said)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return _Said()


def head(ask: Ask) -> bytes:
    """What comes before a request's body."""
    return _head(ask.method, ask.path, tuple(ask.headers.items()), sum(map(len, ask.body)))


@lru_cache(maxsize=64)
def _head(method: str, path: str, headers: tuple[tuple[str, str], ...], length: int) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in headers]
    if method != "GET":
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class ReplyReader:
    """Makes the reply to one request of what comes; nothing may come after it.

    Attributes:
        reply: when it is whole.
        last: whether the other side ends the connection after it.
    """

    def __init__(self) -> None:
        self.reply: Reply | None = None
        self.last = False
        self._status = 0
        self._headers: Mapping[str, str] = {}
        self._buffer = bytearray(HEAD_LIMIT)
        self._filled = 0
        self._in_head = True

    def room(self) -> memoryview:
        """Where the next bytes go."""
        return memoryview(self._buffer)[self._filled :]

    def came(self, count: int) -> None:
        """So many bytes were put there.

        Raises:
            ReplyError: when they are none of a reply that can be taken.
        """
        self._filled += count
        if self._in_head:
            self._read_head()
        if not self._in_head and self._filled == len(self._buffer):
            self.reply = Reply(self._status, self._headers, self._buffer)

    def _read_head(self) -> None:
        end = self._buffer.find(b"\r\n\r\n", 0, self._filled)
        if end < 0:
            if self._filled == HEAD_LIMIT:
                raise ReplyError(f"the head of a reply has more than {HEAD_LIMIT} bytes")
            return
        self._status, self._headers, length = _read_head(bytes(memoryview(self._buffer)[:end]))
        self.last = self._headers.get("connection", "").lower() == "close"
        rest = bytes(memoryview(self._buffer)[end + 4 : self._filled])
        if len(rest) > length:
            raise ReplyError("more came than was asked for")
        self._in_head = False
        self._buffer = bytearray(length)
        self._buffer[: len(rest)] = rest
        self._filled = len(rest)


@lru_cache(maxsize=64)
def _read_head(content: bytes) -> tuple[int, Mapping[str, str], int]:
    """Status, headers and the body's length that a head says; most heads of one API are the same.

    Raises:
        ReplyError: when it says nothing that can be taken.
    """
    first, *lines = content.split(b"\r\n")
    status = _STATUS.match(first)
    if status is None:
        raise ReplyError("what answers there does not speak HTTP/1.1")
    headers = {}
    for line in lines:
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()) or "transfer-encoding" in headers:
        raise ReplyError("a reply does not say how long it is")
    if len(length) > len(str(ANSWER_LIMIT)) or int(length) > ANSWER_LIMIT:
        raise ReplyError(f"a reply has {length[:20]} bytes, and may have {ANSWER_LIMIT}")
    return int(status[1]), MappingProxyType(headers), int(length)
