"""Streams of requests (ModelStreamInfer): each is answered as ModelInfer is, in the order they came in.

So it is where no model answers more than once. Requests of a stream are under way at the same time, up to a bound, and
what is wrong with one is said in its answer: the stream goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import msgspec

from agent.serving.exchange import Answer
from agent.serving.rpc.inference import response_message
from agent.serving.rpc.schema import message_class

STREAM = "ModelStreamInfer"
UNDER_WAY = 16  # requests of one stream, until no more are read
IDLE_S = 20.0  # after which a stream gives its place to another, where there is none

_Response = message_class("ModelStreamInferResponse")
Ask = Callable[[bytes, Any], Awaitable[Answer]]


@dataclass(eq=False)
class _Stream:
    """One that is open.

    Attributes:
        answers: of its requests in their order; a word where it has to end, None where it ended by itself.
        room: for requests.
        busy: how many are under way.
        idle_from: since when none is, by the loop's clock.
    """

    idle_from: float
    answers: asyncio.Queue[asyncio.Task[Answer] | str | None] = field(default_factory=asyncio.Queue)
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UNDER_WAY))
    busy: int = 0


class Streams:
    """All that are open. A message of any size may come by each at any time, so each keeps a place to read.

    Args:
        ask: gives a message of ModelInfer, with the context of its call, its answer; it raises nothing.
        reading: places to read.
        most: how many streams there may be.
    """

    def __init__(self, ask: Ask, reading: asyncio.Semaphore, most: int) -> None:
        self._ask = ask
        self._reading = reading
        self._most = most
        self._open: set[_Stream] = set()

    async def call(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Serve one."""
        if not self._make_room():
            said = f"{self._most} streams of requests are open, which is as many as may be: end one, or use ModelInfer"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, said)
        stream = _Stream(asyncio.get_running_loop().time())
        self._open.add(stream)
        try:
            async with self._reading:
                reader = asyncio.create_task(self._read(stream, messages, context))
                try:
                    async for answer in self._answered(stream, context):
                        yield answer
                    await reader
                finally:
                    reader.cancel()
        finally:
            self._open.discard(stream)

    def end(self) -> None:
        """Let all of them end, when what has come by them is answered."""
        for stream in self._open:
            stream.answers.put_nowait("the worker ends: open another stream")

    async def _answered(self, stream: _Stream, context: Any) -> AsyncIterator[bytes]:
        while (one := await stream.answers.get()) is not None:
            if isinstance(one, str):
                await context.abort(grpc.StatusCode.UNAVAILABLE, one)
                return
            answer = await asyncio.shield(one)  # what was begun is ended, as by ModelInfer
            stream.busy -= 1
            stream.idle_from = asyncio.get_running_loop().time()
            yield _said(answer)
            answer.follow()
            stream.room.release()

    async def _read(self, stream: _Stream, messages: AsyncIterator[bytes], context: Any) -> None:
        try:
            while True:
                await stream.room.acquire()
                raw = await anext(messages, None)
                if raw is None:
                    return
                stream.busy += 1
                stream.answers.put_nowait(asyncio.ensure_future(self._ask(raw, context)))
                del raw
        finally:
            stream.answers.put_nowait(None)

    def _make_room(self) -> bool:
        if len(self._open) < self._most:
            return True
        longest = min((one for one in self._open if not one.busy), key=lambda one: one.idle_from, default=None)
        if longest is None or asyncio.get_running_loop().time() - longest.idle_from < IDLE_S:
            return False
        self._open.discard(longest)
        longest.answers.put_nowait(f"no request came by this stream for {IDLE_S:g} s, and another needs its place")
        return True


def _said(answer: Answer) -> bytes:
    if answer.status == 200:
        message = _Response(infer_response=response_message(answer))
        message.infer_response.parameters["triton_final_response"].bool_param = True
    else:
        message = _Response(error_message=msgspec.json.decode(answer.body)["error"])
        message.infer_response.id = answer.headers.get("X-Request-ID", "")
    return bytes(message.SerializeToString())
