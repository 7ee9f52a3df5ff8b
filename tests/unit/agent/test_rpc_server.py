"""Bounds of the gRPC server, on a loop and over loopback, with no model loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from agent.serving.clients import CLIENTS_LIMIT, Clients
from agent.serving.exchange import BODY_LIMIT, Answer, error_answer
from agent.serving.http import Api
from agent.serving.registry import Registry
from agent.serving.rpc import server as rpc
from agent.serving.rpc import streams
from agent.serving.rpc.schema import SERVICE, message_class

ASKED = message_class("ModelReadyRequest")(name="m").SerializeToString()


@asynccontextmanager
async def serving(bytes_allowed: int | None = None) -> AsyncIterator[Any]:
    """A server and a channel to it."""
    api = Api(Registry())
    api.clients = Clients(bytes_allowed=bytes_allowed)
    server = rpc.GrpcServer(api, ["127.0.0.1:0"])
    try:
        async with grpc.aio.insecure_channel(await server.start()) as channel:
            yield channel
    finally:
        await server.stop(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def ask(channel: Any, name: str = "ModelReady") -> Any:
    return channel.unary_unary(f"/{SERVICE}/{name}")


def silent(channel: Any) -> Any:
    """A call that has begun and brings no message."""
    return channel.stream_unary(f"/{SERVICE}/ModelReady")()


def test_calls_that_bring_nothing_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "ARRIVE_S", 0.3)

    async def test() -> None:
        async with serving(2 * BODY_LIMIT) as channel:
            calls = [silent(channel) for _ in range(5)]
            await asyncio.gather(*(one.wait_for_connection() for one in calls))
            assert await ask(channel)(ASKED) == b"", "not ready, and said so after the silent ones went"
            for one in calls:
                assert await one.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                assert "may take 0.3 s to arrive" in await one.details()

    run(test)


def test_calls_at_a_time_are_bounded() -> None:
    async def test() -> None:
        async with serving() as channel:
            calls = [silent(channel) for _ in range(CLIENTS_LIMIT)]
            await asyncio.gather(*(one.wait_for_connection() for one in calls))
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await ask(channel)(ASKED)
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            for one in calls:
                one.cancel()
            async with asyncio.timeout(30):
                while True:
                    try:
                        assert await ask(channel)(ASKED) == b""
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(0.05)
                    else:
                        break

    run(test)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def test_connections_are_bounded() -> None:
    async def greeted(port: int) -> tuple[bool, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PREFACE)
        try:
            return bool(await reader.read(9)), writer
        except ConnectionError:
            return False, writer

    async def test() -> None:
        server = rpc.GrpcServer(Api(Registry()), ["127.0.0.1:0"])
        port = int((await server.start()).rpartition(":")[2])
        try:
            clients = [await greeted(port) for _ in range(CLIENTS_LIMIT + 8)]
            assert [kept for kept, _ in clients] == [True] * CLIENTS_LIMIT + [False] * 8
        finally:
            for _, writer in clients:
                writer.close()
            await server.stop(0)

    run(test)


def test_all_messages_together_are_bounded() -> None:
    async def test() -> None:
        async with serving(bytes_allowed=1000) as channel:
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await ask(channel, "ModelInfer")(bytes(501))
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "hold too much memory" in str(error.value.details())
                assert dict(error.value.trailing_metadata() or ())["retry-after"] == "1"
                assert await ask(channel)(ASKED) == b"", "what was refused is not held"

    run(test)


def stream(channel: Any) -> Any:
    """One that is open, and brings nothing."""
    return channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")()


def test_streams_leave_places_to_other_calls_and_the_idle_give_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving(4 * BODY_LIMIT) as channel:
            calls = [stream(channel) for _ in range(2)]
            for one in calls:
                await one.write(b"")
                assert b"model_name" in await one.read()
            refused = stream(channel)
            assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "2 streams of requests are open" in await refused.details()
            assert await ask(channel)(ASKED) == b""
            monkeypatch.setattr(streams, "IDLE_S", 0.0)
            await calls[0].write(b"")
            await calls[0].read()
            calls.append(stream(channel))
            assert await calls[1].code() is grpc.StatusCode.UNAVAILABLE
            assert "another needs its place" in await calls[1].details()
            await calls[2].write(b"")
            assert b"model_name" in await calls[2].read()
            for one in (calls[0], calls[2]):
                await one.done_writing()
                assert await one.code() is grpc.StatusCode.OK

    run(test)


def test_no_more_of_a_stream_is_read_than_may_be_under_way() -> None:
    read, free = 0, asyncio.Event()

    async def messages() -> AsyncIterator[bytes]:
        nonlocal read
        while read < 3 * streams.UNDER_WAY:
            read += 1
            yield b""

    async def answer(_raw: bytes, _context: Any) -> Answer:
        await free.wait()
        return error_answer(400, "no")

    async def test() -> None:
        places = asyncio.Semaphore(1)
        call = streams.Streams(answer, places, 1).call(messages(), None)
        first = asyncio.create_task(anext(call))
        for _ in range(200):
            await asyncio.sleep(0)
        assert read == streams.UNDER_WAY
        free.set()
        assert b"no" in await first
        assert len([one async for one in call]) == 3 * streams.UNDER_WAY - 1
        assert not places.locked()

    run(test)
