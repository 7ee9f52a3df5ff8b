"""HTTP/1.1 of the local inference API, parsed by httptools: bytes to requests, answers to bytes. It knows no routes.

Everything that a client sends is bounded: the line, headers, bodies (of all clients together too), requests that wait,
and the time that a request may take to arrive. Who is refused is told why before the connection ends.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Protocol

import httptools

from agent.serving.buffers import Buffers
from agent.serving.clients import Clients
from agent.serving.encodings import EncodingError, chosen, compress, expand
from agent.serving.exchange import BODY_LIMIT, REASONS, Answer, Request, error_answer
from agent.serving.same_head import SameHead, same_head

log = logging.getLogger(__name__)
URL_LIMIT = 8 << 10
HEADERS_LIMIT = 64
HEAD_LIMIT = 32 << 10  # bytes of the line and all headers
PIPELINED = 16  # requests that may wait on one connection before no more are read
PIPELINED_LIMIT = 256  # that may be there even so: they came together
ARRIVE_S = 60.0
STRAIGHT_FROM = 16 << 10  # bytes of a body that is read to where it stays, and not by way of the parser
TAKE_S = 60.0  # in which a client must take what it asked for
LINGER_S = 2.0  # in which one that was refused may read why
COMPRESS_FROM = 1024  # bytes of an answer


class Application(Protocol):
    """What answers requests."""

    draining: bool
    clients: Clients
    buffers: Buffers

    async def answer(self, request: Request) -> Answer:
        """One request's answer."""
        ...

    def answer_soon(self, request: Request, say: Callable[[Answer | None], None], *, alone: bool) -> bool:
        """Have it answered without a task that waits for it.

        Args:
            request: that is whole.
            say: is called once where this is true, before this returns or later; with None where it has to be answered
                by `answer` after all.
            alone: whether no other client asks at present, so that nobody waits meanwhile.

        Returns:
            Whether it will be.
        """
        ...


class _Elsewhere:
    """Stands among requests for one that is answered without the task: what follows on it waits.

    Attributes:
        over: whether it was answered.
        request: it, where it was not after all.
        last: whether the connection ends with it.
    """

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.request: Request | None = None
        self.last = False


class _RefusedError(Exception):
    """Raised through the parser, which loses it: what to say is kept beside it."""


class Connection(asyncio.BufferedProtocol):
    """One client. Pipelined requests are answered in their order."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._request = Request()
        self._body = bytearray()
        self._straight: memoryview | None = None  # where a large body goes
        self._arrived = 0  # bytes of that
        self._same: SameHead | None = None  # how the last request began
        self._unparsed = False  # the request that comes began so, and the parser knows nothing of it
        self._waiting: asyncio.Queue[Request | Answer | _Elsewhere | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._local = False
        self._refused: Answer | None = None
        self._begun = 0  # requests
        self._begun_at: float | None = None  # the request that is not whole yet
        self._alone = False  # no other client has asked lately
        self._soon = False  # one is answered elsewhere
        self._elsewhere: _Elsewhere | None = None  # stands for it where others wait behind it
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = self._header_bytes = 0
        self._held = 0
        self._answering = self._paused = self._ended = False
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._local = _is_local(transport)
        if not self._application.clients.come(self):
            self._refuse(503, "too many programs are connected: close connections, or come again")
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """The client has gone."""
        self._waiting.put_nowait(None)
        self._writable.set()
        self._application.clients.go(self)
        if self._timer is not None:
            self._timer.cancel()

    def eof_received(self) -> bool:
        """The client will ask nothing more; it may still wait for answers."""
        self._ended = True
        return self._refused is None and self._has_more_to_say()

    def leave(self) -> None:
        """End the connection: it is idle, and another one needs its place."""
        self._close()

    def pause_writing(self) -> None:
        """The client does not take what was written."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It does again."""
        self._writable.set()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the next bytes go: to where they stay, or to what all connections are read into, one at a time."""
        if self._straight is not None and self._refused is None:
            return self._straight[self._arrived :]
        return self._application.clients.inbox

    def buffer_updated(self, nbytes: int) -> None:
        """Some bytes of requests have come."""
        if self._refused is not None:
            return
        if self._straight is not None:
            if self._hold(nbytes):
                self._arrived += nbytes
                self._straighten()
            return
        clients, fresh = self._application.clients, self._begun_at is None
        if fresh and self._same is not None and self._same.begins(clients.came, nbytes):
            self._begin_same(self._same, clients.inbox[:nbytes])
        else:
            before = self._begun
            self._feed(clients.inbox[:nbytes])
            if fresh and self._begun == before + 1:
                self._same = same_head(clients.came, nbytes, self._request)
        if self._in_head:
            self._head_bytes += nbytes
            if self._head_bytes > HEAD_LIMIT and self._refused is None:
                self._refuse(431, f"the line and all headers may have {HEAD_LIMIT} bytes")
        if self._begun_at is not None and self._timer is None and self._refused is None:
            self._timer = asyncio.get_running_loop().call_later(ARRIVE_S, self._overdue)

    def _begin_same(self, same: SameHead, came: memoryview) -> None:
        """A request begins as the last one did: what follows on its head is its body."""
        self._begin(same.request(local=self._local))
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
            if self._refused is None:
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
        self._begin(Request(local=self._local))

    def _begin(self, request: Request) -> None:
        self._request, self._body, self._straight = request, bytearray(), None
        self._in_head, self._head_bytes, self._header_bytes = True, 0, 0
        self._begun += 1
        self._begun_at = asyncio.get_running_loop().time()
        self._alone = self._application.clients.company.is_alone(self, self._begun_at)
        self._application.clients.busy(self)

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
        if self._request.headers.get("expect", "").lower() == "100-continue" and not self._has_more_to_say():
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._request.method = self._parser.get_method().decode()
        self._request.keep_alive = self._parser.should_keep_alive()
        if int(length) >= STRAIGHT_FROM and "transfer-encoding" not in self._request.headers:
            self._straight, self._arrived = self._room(self._request, int(length)), 0

    def _room(self, request: Request, length: int) -> memoryview:
        """Where a request's body goes, so that its binary tensors lie aligned."""
        head = request.headers.get("inference-header-content-length", "")
        skipped = int(head) if head.isascii() and head.isdigit() and len(head) < 9 else 0
        return self._application.buffers.take(length, skipped)

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
        self._whole(self._body if self._straight is None else self._straight)
        if self._refused is not None:
            raise _RefusedError

    def _whole(self, body: bytearray | memoryview) -> None:
        self._request.body, self._straight = body, None
        self._begun_at = None
        if self._answers_soon():
            return
        if self._waiting.qsize() >= PIPELINED_LIMIT:
            self._refuse(429, f"{PIPELINED_LIMIT} requests wait on this connection: read the answers")
            return
        self._wait(self._request)
        if self._waiting.qsize() >= PIPELINED and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _answers_soon(self) -> bool:
        """Have the request answered without a task that waits for it, where that can be."""
        request = self._request
        if self._has_more_to_say() or "accept-encoding" in request.headers or "content-encoding" in request.headers:
            return False
        say, self._soon = partial(self._say_soon, request, len(request.body)), True
        try:
            if self._application.answer_soon(request, say, alone=self._alone):
                return True
        except Exception as error:  # noqa: BLE001 (it is logged, and the client told)
            say(_failed(request, error))
            return True
        self._soon = False
        return False

    def _say_soon(self, request: Request, size: int, answer: Answer | None) -> None:
        """The answer to such a request; None where it is to be answered like others after all."""
        self._soon, here, self._elsewhere = False, self._elsewhere, None
        keep_alive = answer is None or self._say(request, answer, size)
        if here is None and answer is not None and keep_alive and self._writable.is_set() and not self._ended:
            if self._begun_at is None:
                self._application.clients.idle(self)
            return
        if here is None:
            here = _Elsewhere()
            self._waiting.put_nowait(here)
        here.request, here.last = request if answer is None else None, not keep_alive
        here.over.set()

    def _wait(self, one: Request | Answer) -> None:
        """Let one wait for what came before it."""
        if self._soon and self._elsewhere is None:
            self._elsewhere = _Elsewhere()
            self._waiting.put_nowait(self._elsewhere)
        self._waiting.put_nowait(one)

    def _has_more_to_say(self) -> bool:
        """Whether answers to earlier requests are still to come."""
        return self._answering or self._soon or not self._waiting.empty()

    def _hold(self, size: int) -> bool:
        if not self._application.clients.hold(size):
            self._refuse(503, "requests hold too much memory: send smaller ones, or come again")
            return False
        self._held += size
        return True

    def _release(self, size: int) -> None:
        size = min(size, self._held)  # nothing, where the client has gone and all of its bytes with it
        self._application.clients.release(size)
        self._held -= size

    def _overdue(self) -> None:
        """Look whether a request has been on its way for too long."""
        self._timer = None
        if self._begun_at is None or self._refused is not None:
            return
        loop = asyncio.get_running_loop()
        left = self._begun_at + ARRIVE_S - loop.time()
        if left <= 0 and not self._paused:
            self._refuse(408, f"a request may take {ARRIVE_S:g} s to arrive")
        else:
            self._timer = loop.call_later(max(left, 1.0), self._overdue)

    def _refuse(self, status: int, message: str) -> None:
        """Read nothing more, and say why when what came before is answered."""
        if self._refused is None:
            self._refused = error_answer(status, message)
            self._wait(self._refused)

    async def _serve(self) -> None:
        try:
            while (came := await self._waiting.get()) is not None:
                self._answering = True
                if isinstance(came, Answer):
                    await self._part(came)
                    return
                going_on = await (self._pass(came) if isinstance(came, _Elsewhere) else self._serve_one(came))
                if not going_on or (self._ended and self._waiting.empty()):
                    self._close()
                    return
                self._answering = False
                if self._begun_at is None and self._waiting.empty():
                    self._application.clients.idle(self)
        finally:
            self._release(self._held)

    async def _serve_one(self, request: Request) -> bool:
        """Answer a request; false when it was the connection's last."""
        size = len(request.body)
        try:
            answer = await self._answer(request)
        except Exception as error:  # noqa: BLE001 (it is logged, and the client told)
            answer = _failed(request, error)
        keep_alive = self._say(request, answer, size)
        if not await self._taken():
            return False
        if self._paused and self._waiting.qsize() < PIPELINED and self._transport is not None:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
        return keep_alive

    async def _pass(self, here: _Elsewhere) -> bool:
        """Wait for an answer that is given elsewhere; false when it was the connection's last."""
        await here.over.wait()
        if here.request is not None:
            return await self._serve_one(here.request)
        return await self._taken() and not here.last

    def _say(self, request: Request, answer: Answer, size: int) -> bool:
        """Write an answer to a request, whose body had so many bytes; false when it is the connection's last."""
        keep_alive = request.keep_alive and not self._application.draining
        self._write(answer, keep_alive=keep_alive)
        answer.follow()
        self._release(size)
        return keep_alive

    async def _taken(self) -> bool:
        """Wait until the client has taken most of what was written; false when it does not."""
        if not self._writable.is_set():
            try:
                await asyncio.wait_for(self._writable.wait(), TAKE_S)
            except TimeoutError:
                if self._transport is not None:
                    self._transport.abort()
                return False
        return True

    async def _answer(self, request: Request) -> Answer:
        """Its answer; bodies are expanded before, and compressed after."""
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        expanded = 0
        if encoding != "identity" and request.body:
            try:
                request.body = await asyncio.to_thread(expand, bytes(request.body), encoding, BODY_LIMIT)
            except EncodingError as error:
                return error_answer(error.status, str(error))
            expanded = len(request.body)
            if not self._application.clients.hold(expanded):
                return error_answer(503, "requests hold too much memory: send smaller ones, or come again")
        try:
            answer = await self._application.answer(request)
        finally:
            self._application.clients.release(expanded)
        accepted = request.headers.get("accept-encoding")
        wanted = chosen(accepted) if accepted and len(answer.body) >= COMPRESS_FROM else None
        if wanted is not None:
            answer.body = await asyncio.to_thread(compress, answer.body, wanted)
            answer.headers["Content-Encoding"] = wanted
        return answer

    async def _part(self, answer: Answer) -> None:
        """Say why, and end when the client has closed or a moment has passed.

        Closing with bytes unread would have the kernel throw away what was written.
        """
        self._write(answer, keep_alive=False)
        if self._transport is None or self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        try:
            async with asyncio.timeout(LINGER_S):
                while await self._waiting.get() is not None:
                    pass
        except TimeoutError:
            self._transport.abort()

    def _write(self, answer: Answer, *, keep_alive: bool) -> None:
        head = _reply_head(answer.status, len(answer.body), tuple(answer.headers.items()), keep_alive)
        self._send(head + answer.body)

    def _send(self, content: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(content)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@lru_cache(maxsize=64)
def _reply_head(status: int, length: int, headers: tuple[tuple[str, str], ...], keep_alive: bool) -> bytes:  # noqa: FBT001
    """What comes before an answer's body; most answers of a model have the same."""
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, '')}", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines.append(f"Connection: {'keep-alive' if keep_alive else 'close'}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def _is_local(transport: asyncio.Transport) -> bool:
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        return True
    peer = transport.get_extra_info("peername")
    try:
        address = ipaddress.ip_address(peer[0].partition("%")[0])
    except (TypeError, IndexError, AttributeError, ValueError):
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _failed(request: Request, error: Exception) -> Answer:
    log.error("answering %s failed", request.path, exc_info=error)
    return error_answer(500, f"{type(error).__name__}: {error}")
