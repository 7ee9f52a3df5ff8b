"""The local inference API over gRPC: calls to requests of the routes, which HTTP's connections ask too.

It runs on the worker's event loop. Bounded are the messages, all of them together, the calls at a time, and the time
that a message may take to arrive. A message is read only when there is room for the largest one, which is why every
method is served as one whose request is a stream (of one message): only then is it asked before the library reads.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio
import msgspec

from agent.serving.bad_request import BadRequestError
from agent.serving.clients import CLIENTS_LIMIT
from agent.serving.exchange import BODY_LIMIT, Answer, again_answer, error_answer
from agent.serving.http import Api
from agent.serving.rpc.calls import METHODS, Caller, Method
from agent.serving.rpc.schema import SERVICE
from agent.serving.rpc.streams import STREAM, Streams

log = logging.getLogger(__name__)
ARRIVE_S = 20.0
STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
OPTIONS = (
    ("grpc.so_reuseport", 0),  # two agents at one port would share its clients, unnoticed
    ("grpc.max_receive_message_length", BODY_LIMIT),
    ("grpc.max_allowed_incoming_connections", CLIENTS_LIMIT),
    ("grpc.max_connection_idle_ms", 300_000),  # a connection without calls gives its place to others
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what a message expands to is not bounded
)
ABSENT = {
    "CudaSharedMemoryStatus": "CUDA shared memory is not offered: use system shared memory",
    "CudaSharedMemoryRegister": "CUDA shared memory is not offered: use system shared memory",
    "CudaSharedMemoryUnregister": "CUDA shared memory is not offered: use system shared memory",
    "TraceSetting": "trace settings are not offered: ModelStatistics has counts and times",
    "LogSettings": "log settings are not offered: the agent logs to its standard error",
}


class GrpcServer:
    """The service.

    Args:
        api: the routes.
        addresses: where it listens, such as `127.0.0.1:8471` and `unix:/run/shoal/grpc.sock`.
    """

    def __init__(self, api: Api, addresses: list[str]) -> None:
        self._api = api
        self._addresses = addresses
        places = max(2, api.clients.bytes_allowed // BODY_LIMIT)
        self._reading = asyncio.Semaphore(places)
        self._streams = Streams(partial(self.answer, Method("ModelInfer")), self._reading, places // 2)
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=CLIENTS_LIMIT)
        self._begun: set[asyncio.Task[Answer]] = set()
        handlers = {name: _handler(_Served(self, Method(name)).call) for name in METHODS}
        handlers |= {name: _handler(_Absent(said).call) for name, said in ABSENT.items()}
        handlers[STREAM] = grpc.stream_stream_rpc_method_handler(self._streams.call)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def start(self) -> str:
        """Listen; the addresses, with the port that was given where 0 was asked for.

        Raises:
            RuntimeError: when an address can't be had.
        """
        found = []
        for address in self._addresses:
            port = self._server.add_insecure_port(address)
            found.append(address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}")
        await self._server.start()
        return ", ".join(found)

    async def stop(self, grace_s: float) -> None:
        """Listen no more, and let what has begun end within that time."""
        self._streams.end()
        await self._server.stop(grace_s)

    async def ask(self, method: Method, messages: AsyncIterator[bytes], context: Any) -> Answer:
        """What the routes answer to a call."""
        async with self._reading:
            try:
                raw = await asyncio.wait_for(anext(messages, None), ARRIVE_S)
            except TimeoutError:
                return error_answer(408, f"a request may take {ARRIVE_S:g} s to arrive")
        if raw is None:
            return error_answer(400, f"a call of {method.name} has one message, and there is none")
        return await self.answer(method, raw, context)

    async def answer(self, method: Method, raw: bytes, context: Any) -> Answer:
        """What the routes answer to a message of a call."""
        clients, size = self._api.clients, 2 * len(raw)  # the message, and the request that is made of it
        if not clients.hold(size):
            return again_answer(503, "requests hold too much memory: send smaller ones, or come again")
        # A call that ends before its answer, by its deadline or by its client, takes nothing back: the request has the
        # same deadline, and is counted as HTTP's is.
        asked = asyncio.create_task(self._answer(method, raw, context))
        del raw
        self._begun.add(asked)
        asked.add_done_callback(self._begun.discard)
        asked.add_done_callback(lambda _task: clients.release(size))
        return await asyncio.shield(asked)

    async def _answer(self, method: Method, raw: bytes, context: Any) -> Answer:
        try:
            request = method.request(raw, Caller(_is_local(context.peer()), context.time_remaining()))
            del raw
            answer = await self._api.answer(request)
            if answer.status != 200:
                answer.headers["X-Request-ID"] = request.headers.get("x-request-id", "")
            return answer  # noqa: TRY300
        except BadRequestError as error:
            return error_answer(error.status, str(error))
        except Exception as error:
            log.exception("answering %s failed", method.name)
            return error_answer(500, f"{type(error).__name__}: {error}")


class _Served:
    """A method that is offered."""

    def __init__(self, server: GrpcServer, method: Method) -> None:
        self._server = server
        self._method = method

    async def call(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        answer = await self._server.ask(self._method, messages, context)
        if self._method.name == "ModelReady" and answer.status in {404, 503}:
            return self._method.answer(Answer(200))  # not ready, which is no error
        if answer.status != 200:
            after = answer.headers.get("Retry-After")
            trailing = () if after is None else (("retry-after", after),)
            said = msgspec.json.decode(answer.body)["error"]
            await context.abort(STATUSES.get(answer.status, grpc.StatusCode.UNKNOWN), said, trailing)
        context.add_done_callback(lambda _context: answer.follow())
        return self._method.answer(answer)


class _Absent:
    """A method that is not."""

    def __init__(self, said: str) -> None:
        self._said = said

    async def call(self, _messages: AsyncIterator[bytes], context: Any) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, self._said)
        return b""


def _handler(call: Any) -> Any:
    return grpc.stream_unary_rpc_method_handler(call)


def _is_local(peer: str) -> bool:
    """Whether a client is on this device, by what the library says of it, such as `ipv6:%5B::1%5D:40000`."""
    family, _, place = unquote(peer).partition(":")
    if family == "unix":
        return True
    try:
        address = ipaddress.ip_address(place.rpartition(":")[0].strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return family in {"ipv4", "ipv6"} and (mapped or address).is_loopback
