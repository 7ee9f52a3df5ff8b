"""Connections of the local inference API over real sockets: order, bounds, and who is sent away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from agent.serving import incoming
from agent.serving.buffers import Buffers
from agent.serving.clients import Clients
from agent.serving.connection import Connection
from agent.serving.exchange import Answer, Request, json_answer


class Echo:
    """Answers with the path and the size of the body, later where the path says so."""

    def __init__(self, clients: Clients | None = None) -> None:
        self.draining = False
        self.clients = Clients() if clients is None else clients  # an empty one is false
        self.buffers = Buffers()
        self.free = asyncio.Event()  # those that are held wait for it

    async def answer(self, request: Request) -> Answer:
        if "held" in request.path:
            await self.free.wait()
        if "slow" in request.path:
            await asyncio.sleep(0.1)
        return self.echo(request)

    def answer_soon(self, request: Request, say: Callable[[Answer | None], None], *, alone: bool) -> bool:
        if "held" in request.path or "slow" in request.path:
            return False
        if "soon" in request.path:
            asyncio.get_running_loop().call_later(0.1, say, None if "after-all" in request.path else self.echo(request))
        else:
            say(self.echo(request))
        return True

    def echo(self, request: Request) -> Answer:
        return json_answer({"path": request.path, "bytes": len(request.body), "local": request.local})


@asynccontextmanager
async def served(application: Echo) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(lambda: Connection(application), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def said(application: Echo, *pieces: bytes, pause: float = 0.0, end: bool = False) -> bytes:
    """All that a client reads that sends some bytes, until the connection ends or nothing more comes."""
    async with served(application) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        if end:
            writer.write_eof()
        got = b""
        try:
            async with asyncio.timeout(1.5):
                while piece := await reader.read(65536):
                    got += piece
        except TimeoutError:
            got += b"(still open)"
        writer.close()
        return got


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: d", *headers, "", ""]).encode()


def test_pipelined_requests_are_answered_in_their_order() -> None:
    paths = ["/slow", *(f"/{number}" for number in range(60))]
    got = asyncio.run(said(Echo(), b"".join(get(path) for path in paths)))
    assert [line.split(b'"')[3].decode() for line in got.splitlines() if line.startswith(b"{")] == paths
    assert b'"local":true' in got


@pytest.mark.parametrize("first", ["/soon", "/soon-after-all", "/slow", "/at-once"])
def test_what_follows_on_one_that_is_answered_elsewhere_waits_for_it(first: str) -> None:
    paths = [first, "/1", "/soon", "/2", "/soon-after-all"]
    got = asyncio.run(said(Echo(), get(paths[0]), b"".join(get(path) for path in paths[1:]), pause=0.02))
    assert [line.split(b'"')[3].decode() for line in got.splitlines() if line.startswith(b"{")] == paths


@pytest.mark.parametrize("first", ["/soon", "/soon-after-all", "/at-once"])
def test_the_last_request_of_a_connection_ends_it_however_it_is_answered(first: str) -> None:
    got = asyncio.run(said(Echo(), get(first, "Connection: close")))
    assert got.startswith(b"HTTP/1.1 200")
    assert not got.endswith(b"(still open)")


@pytest.mark.parametrize("first", ["/soon", "/soon-after-all"])
def test_what_is_refused_behind_one_that_is_answered_elsewhere_waits_for_it(first: str) -> None:
    got = asyncio.run(said(Echo(), get(first), b"no HTTP at all\r\n\r\n", pause=0.02))
    assert got.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 400" in got


def test_who_goes_before_the_answer_is_there_leaves_no_bytes_behind() -> None:
    async def run() -> None:
        application = Echo()
        async with served(application) as port:
            for _ in range(2):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(post(b"x" * 50_000).replace(b"/x", b"/soon"))
                await writer.drain()
                await asyncio.sleep(0.03)
                writer.close()
            await asyncio.sleep(0.2)
        assert application.clients.hold(application.clients.bytes_allowed), "as much as at the beginning"
        assert not application.clients.hold(1)

    asyncio.run(run())


def test_a_client_that_says_it_is_done_gets_its_answer() -> None:
    got = asyncio.run(said(Echo(), get("/slow"), end=True))
    assert got.startswith(b"HTTP/1.1 200")
    assert not got.endswith(b"(still open)")


def test_chunked_bodies_are_put_together() -> None:
    head = b"POST /x HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\n"
    got = asyncio.run(said(Echo(), head, b"5\r\nhello\r\n3;x=y\r\n", b"abc\r\n0\r\n\r\n", pause=0.02))
    assert b'"bytes":8' in got


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01 no HTTP at all\r\n\r\n", 400),
        (get("/" + "a" * 9000), 414),
        (get("/", *(f"X-{number}: 1" for number in range(80))), 431),
        (get("/", "X: " + "a" * 40_000), 431),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000, 431),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
def test_what_is_too_much_is_refused_and_the_connection_ends(sent: bytes, status: int) -> None:
    first = get("/slow")
    got = asyncio.run(said(Echo(), first + sent))
    assert got.startswith(b"HTTP/1.1 200")  # what came before it is answered first
    assert f"HTTP/1.1 {status} ".encode() in got
    assert b'{"error":' in got
    assert not got.endswith(b"(still open)")


def test_a_body_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "ARRIVE_S", 0.2)
    head = b"POST / HTTP/1.1\r\nHost: d\r\nContent-Length: 100\r\n\r\n"
    got = asyncio.run(said(Echo(), head, *[b"x"] * 8, pause=0.05))
    assert got.startswith(b"HTTP/1.1 408")
    assert not got.endswith(b"(still open)")


def test_a_client_that_is_idle_gives_its_place_and_one_that_asks_does_not() -> None:
    async def run() -> None:
        application = Echo(Clients(limit=2))
        async with served(application) as port:
            idle, asking = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            asking[1].write(get("/held"))
            await asyncio.sleep(0.1)
            third = await asyncio.open_connection("127.0.0.1", port)
            assert await idle[0].read() == b""
            third[1].write(b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n")
            await asyncio.sleep(0.1)
            fourth = await asyncio.open_connection("127.0.0.1", port)
            assert (await fourth[0].read()).startswith(b"HTTP/1.1 503")
            application.free.set()
            assert (await asking[0].readline()).startswith(b"HTTP/1.1 200")
            for one in (idle, asking, third, fourth):
                one[1].close()
            await asyncio.sleep(0.1)
        assert len(application.clients) == 0

    asyncio.run(run())


def test_all_bodies_together_are_bounded_and_given_back() -> None:
    async def run() -> None:
        application = Echo(Clients(bytes_allowed=1000))
        async with served(application) as port:
            first = await asyncio.open_connection("127.0.0.1", port)
            first[1].write(b"POST / HTTP/1.1\r\nContent-Length: 900\r\n\r\n" + b"x" * 800)
            await asyncio.sleep(0.05)
            second = await asyncio.open_connection("127.0.0.1", port)
            second[1].write(b"POST / HTTP/1.1\r\nContent-Length: 300\r\n\r\n" + b"x" * 300)
            assert (await second[0].read()).startswith(b"HTTP/1.1 503")
            first[1].close()
            await asyncio.sleep(0.1)
            assert application.clients.hold(1000)
            second[1].close()
            await asyncio.sleep(0.05)

    asyncio.run(run())


class Kept(Echo):
    """One that keeps what came until it has all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[bytes | bytearray | memoryview] = []

    async def answer(self, request: Request) -> Answer:
        self.bodies.append(request.body)
        return await super().answer(request)

    def answer_soon(self, request: Request, say: Callable[[Answer | None], None], *, alone: bool) -> bool:
        return False


def post(content: bytes, *headers: str) -> bytes:
    lines = ["POST /x HTTP/1.1", "Host: d", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


@pytest.mark.parametrize("piece", [1000, 16_384, 70_000, 10_000_000])
def test_bodies_of_all_sizes_come_whole_however_they_are_cut(piece: int) -> None:
    sizes = [0, 5, 16_383, 16_384, 16_385, 40_000, 200_000, 7, 100_000, 3_000_000, 1, 65_536]
    contents = [
        bytes((number + index) % 251 for index in range(250)) * (size // 250) for number, size in enumerate(sizes)
    ]
    contents = [content + b"z" * (size - len(content)) for content, size in zip(contents, sizes, strict=True)]
    stream = b"".join(
        post(content, f"Inference-Header-Content-Length: {index}") for index, content in enumerate(contents)
    )
    application = Kept()
    pieces = [stream[start : start + piece] for start in range(0, len(stream), piece)]
    got = asyncio.run(said(application, *pieces))
    assert got.count(b"HTTP/1.1 200") == len(sizes)
    assert [bytes(body) for body in application.bodies] == contents
    assert application.clients.hold(application.clients.bytes_allowed)  # nothing is held any more


def test_a_large_body_that_is_the_last_ends_its_connection() -> None:
    got = asyncio.run(said(Echo(), post(b"x" * 50_000, "Connection: close")))
    assert got.count(b"HTTP/1.1 200") == 1
    assert not got.endswith(b"(still open)")


def test_what_a_large_body_would_hold_is_counted_as_it_comes() -> None:
    clients = Clients(bytes_allowed=100_000)
    got = asyncio.run(said(Echo(clients), post(b"x" * 300_000)[:250_000]))
    assert b"503" in got.splitlines()[0]
    assert clients.hold(100_000)
