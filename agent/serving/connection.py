"""A connection to the local inference API: requests are answered in their order, and answers made bytes of HTTP/1.1.

It knows no routes. How many requests wait is bounded, and how long a client may take for its answer. Who is refused is
told why before the connection ends.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Protocol

from agent.serving.buffers import Buffers
from agent.serving.clients import Clients
from agent.serving.encodings import EncodingError, chosen, compress, expand
from agent.serving.exchange import BODY_LIMIT, REASONS, Answer, Request, error_answer
from agent.serving.incoming import Incoming

log = logging.getLogger(__name__)
PIPELINED = 16  # requests that may wait on one connection before no more are read
PIPELINED_LIMIT = 256  # that may be there even so: they came together
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


class Connection(asyncio.BufferedProtocol):
    """One client. Pipelined requests are answered in their order.

    Args:
        application: answers them.

    Attributes:
        reading: whether more is read at present.
    """

    def __init__(self, application: Application) -> None:
        self.reading = True
        self._application = application
        self._incoming = Incoming(self, application.clients, application.buffers)
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Queue[Request | Answer | _Elsewhere | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._soon = False  # one is answered elsewhere
        self._elsewhere: _Elsewhere | None = None  # stands for it where others wait behind it
        self._refused = self._answering = self._ended = False
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._incoming.local = _is_local(transport)
        if not self._application.clients.come(self):
            self._incoming.end()
            self.refuse(503, "too many programs are connected: close connections, or come again")
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """The client has gone."""
        self._waiting.put_nowait(None)
        self._writable.set()
        self._application.clients.go(self)
        self._incoming.end()

    def eof_received(self) -> bool:
        """The client will ask nothing more; it may still wait for answers."""
        self._ended = True
        return not self._refused and self._has_more_to_say()

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
        """Where the next bytes go."""
        return self._incoming.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Some bytes of requests have come."""
        self._incoming.came(nbytes)

    def take(self, request: Request) -> bool:
        """A request is whole; false when nothing more is wanted."""
        if self._answers_soon(request):
            return True
        if self._waiting.qsize() >= PIPELINED_LIMIT:
            self._incoming.end()
            self.refuse(429, f"{PIPELINED_LIMIT} requests wait on this connection: read the answers")
            return False
        self._wait(request)
        if self._waiting.qsize() >= PIPELINED and self.reading and self._transport is not None:
            self.reading = False
            self._transport.pause_reading()
        return True

    def refuse(self, status: int, message: str) -> None:
        """Say why nothing more is read, when what came before is answered."""
        self._refused = True
        self._wait(error_answer(status, message))

    def expect(self) -> None:
        """Let a client send its body, where nothing else is to be said to it."""
        if not self._has_more_to_say():
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _answers_soon(self, request: Request) -> bool:
        """Have a request answered without a task that waits for it, where that can be."""
        if self._has_more_to_say() or "accept-encoding" in request.headers or "content-encoding" in request.headers:
            return False
        say, self._soon = partial(self._say_soon, request, len(request.body)), True
        try:
            if self._application.answer_soon(request, say, alone=self._incoming.alone):
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
            if self._incoming.begun_at is None:
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
                if self._incoming.begun_at is None and self._waiting.empty():
                    self._application.clients.idle(self)
        finally:
            self._incoming.release()

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
        if not self.reading and self._waiting.qsize() < PIPELINED and self._transport is not None:
            self.reading = True
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
        self._incoming.release(size)
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
