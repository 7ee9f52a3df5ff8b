"""What one client sends to the local inference API: HTTP/1.1, parsed by httptools, to requests. It answers nothing.

Everything is bounded: the line, headers, bodies (of all clients together too), and the time that a request may take to
arrive.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import httptools

from agent.protocol.datatypes import HEADER_LENGTH_READ
from agent.serving.buffers import Buffers
from agent.serving.clients import Client, Clients
from agent.serving.exchange import BODY_LIMIT, Request
from agent.serving.same_head import SameHead, same_head

URL_LIMIT = 8 << 10
HEADERS_LIMIT = 64
HEAD_LIMIT = 32 << 10  # bytes of the line and all headers
ARRIVE_S = 60.0
STRAIGHT_FROM = 16 << 10  # bytes of a body that is read to where it stays, and not by way of the parser


class Taker(Client, Protocol):
    """Who takes requests: the client's connection.

    Attributes:
        reading: whether more is read at present.
    """

    reading: bool

    def take(self, request: Request) -> bool:
        """One is whole; false when nothing more is wanted of this client."""
        ...

    def refuse(self, status: int, message: str) -> None:
        """One can't be taken, for this reason, and nothing more is read."""
        ...

    def expect(self) -> None:
        """The client sends no body before it is told to go on."""
        ...


class _RefusedError(Exception):
    """Raised through the parser, which loses it: the taker was told why."""


class Incoming:
    """Of one client.

    Args:
        taker: of its requests.
        clients: all that are connected.
        buffers: that large bodies arrive in.

    Attributes:
        local: whether the client is of this device.
        begun_at: since when a request is on its way that is not whole yet, by the event loop's clock; None: none is.
        alone: whether no other client has asked lately.
    """

    def __init__(self, taker: Taker, clients: Clients, buffers: Buffers) -> None:
        self.local = False
        self.begun_at: float | None = None
        self.alone = False
        self._taker, self._clients, self._buffers = taker, clients, buffers
        self._parser: Any = httptools.HttpRequestParser(self)
        self._request = Request()
        self._body = bytearray()
        self._straight: memoryview | None = None  # where a large body goes
        self._arrived = 0  # bytes of that
        self._same: SameHead | None = None  # how the last request began
        self._unparsed = False  # the request that comes began so, and the parser knows nothing of it
        self._begun = 0  # requests
        self._in_head = False
        self._head_bytes = self._header_bytes = 0
        self._held = 0
        self._over = False
        self._timer: asyncio.TimerHandle | None = None

    def room(self) -> memoryview:
        """Where the next bytes go: to where they stay, or to what all connections are read into, one at a time."""
        if self._straight is not None and not self._over:
            return self._straight[self._arrived :]
        return self._clients.inbox

    def came(self, count: int) -> None:
        """So many bytes are there."""
        if self._over:
            return
        if self._straight is not None:
            if self._hold(count):
                self._arrived += count
                self._straighten()
            return
        clients, fresh = self._clients, self.begun_at is None
        if fresh and self._same is not None and self._same.begins(clients.came, count):
            self._begin_same(self._same, clients.inbox[:count])
        else:
            before = self._begun
            self._feed(clients.inbox[:count])
            if fresh and self._begun == before + 1:
                self._same = same_head(clients.came, count, self._request)
        if self._in_head:
            self._head_bytes += count
            if self._head_bytes > HEAD_LIMIT:
                self._refuse(431, f"the line and all headers may have {HEAD_LIMIT} bytes")
        if self.begun_at is not None and self._timer is None and not self._over:
            self._timer = asyncio.get_running_loop().call_later(ARRIVE_S, self._overdue)

    def end(self) -> None:
        """Take nothing more."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()

    def release(self, size: int | None = None) -> None:
        """So many bytes of bodies are done with; all of them by default."""
        size = self._held if size is None else min(size, self._held)  # nothing, where all went with the client
        self._clients.release(size)
        self._held -= size

    def _begin_same(self, same: SameHead, came: memoryview) -> None:
        """A request begins as the last one did: what follows on its head is its body."""
        self._begin(same.request(local=self.local))
        self._in_head = False
        body = came[len(same.content) :]
        if len(body) == same.length:
            if self._hold(same.length):
                self._whole(bytearray(body))
            return
        self._unparsed = True
        self._straight, self._arrived = self._room(self._request, same.length), 0
        if self._hold(len(body)):
            self._straight[: len(body)] = body
            self._arrived = len(body)

    def _feed(self, data: memoryview) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._request.keep_alive = False  # it is answered as if it had not asked for another protocol
        except httptools.HttpParserError as error:
            self._refuse(400, f"this is not HTTP/1.1: {error}")

    def _straighten(self) -> None:
        """Where a large body is whole, its request is."""
        if self._straight is not None and self._arrived == len(self._straight):
            if not self._unparsed:
                self._parser = httptools.HttpRequestParser(self)  # the one before waits for the body
            self._unparsed = False
            self._whole(self._straight)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._begin(Request(local=self.local))

    def _begin(self, request: Request) -> None:
        self._request, self._body, self._straight = request, bytearray(), None
        self._in_head, self._head_bytes, self._header_bytes = True, 0, 0
        self._begun += 1
        self.begun_at = asyncio.get_running_loop().time()
        self.alone = self._clients.company.is_alone(self, self.begun_at)
        self._clients.busy(self._taker)

    def on_url(self, url: bytes) -> None:
        """A part of its path."""
        self._request.path += url.decode("latin-1")
        if len(self._request.path) > URL_LIMIT:
            self._refuse(414, f"the path may have {URL_LIMIT} bytes")
            raise _RefusedError

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._header_bytes += len(name) + len(value)
        if len(self._request.headers) >= HEADERS_LIMIT or self._header_bytes > HEAD_LIMIT:
            self._refuse(431, f"there may be {HEADERS_LIMIT} headers with {HEAD_LIMIT} bytes")
            raise _RefusedError
        self._request.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Its body follows."""
        self._in_head = False
        length = self._request.headers.get("content-length", "0")
        if int(length) > BODY_LIMIT:  # the parser let it through: it is a number
            self._refuse(413, f"a body may have {BODY_LIMIT} bytes, and this one has {length}")
            raise _RefusedError
        if self._request.headers.get("expect", "").lower() == "100-continue":
            self._taker.expect()
        self._request.method = self._parser.get_method().decode()
        self._request.keep_alive = self._parser.should_keep_alive()
        if int(length) >= STRAIGHT_FROM and "transfer-encoding" not in self._request.headers:
            self._straight, self._arrived = self._room(self._request, int(length)), 0

    def _room(self, request: Request, length: int) -> memoryview:
        """Where a request's body goes, so that its binary tensors lie aligned."""
        head = request.headers.get(HEADER_LENGTH_READ, "")
        skipped = int(head) if head.isascii() and head.isdigit() and len(head) < 9 else 0
        return self._buffers.take(length, skipped)

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        if self._straight is not None:
            if not self._hold(len(body)):
                raise _RefusedError
            self._straight[self._arrived : self._arrived + len(body)] = body
            self._arrived += len(body)
            return
        if len(self._body) + len(body) > BODY_LIMIT:
            self._refuse(413, f"a body may have {BODY_LIMIT} bytes")
            raise _RefusedError
        if not self._hold(len(body)):
            raise _RefusedError
        self._body += body

    def on_message_complete(self) -> None:
        """It is whole."""
        if not self._whole(self._body if self._straight is None else self._straight):
            raise _RefusedError

    def _whole(self, body: bytearray | memoryview) -> bool:
        self._request.body, self._straight = body, None
        self.begun_at = None
        return self._taker.take(self._request)

    def _hold(self, size: int) -> bool:
        if not self._clients.hold(size):
            self._refuse(503, "requests hold too much memory: send smaller ones, or come again")
            return False
        self._held += size
        return True

    def _overdue(self) -> None:
        """Look whether a request has been on its way for too long."""
        self._timer = None
        if self.begun_at is None or self._over:
            return
        loop = asyncio.get_running_loop()
        left = self.begun_at + ARRIVE_S - loop.time()
        if left <= 0 and self._taker.reading:
            self._refuse(408, f"a request may take {ARRIVE_S:g} s to arrive")
        else:
            self._timer = loop.call_later(max(left, 1.0), self._overdue)

    def _refuse(self, status: int, message: str) -> None:
        if not self._over:
            self._over = True
            self._taker.refuse(status, message)
