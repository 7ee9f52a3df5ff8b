"""Reading from PostgreSQL by the event loop: many at once, and connections that fail."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fleet_server import loop_reads
from fleet_server.loop_reads import CONNECTIONS, LoopReads
from fleet_server.trust.ca import FleetCa, key_pem
from tests.databases import postgresql
from tests.fleet import wait_until

ResultT = TypeVar("ResultT")
Ask = Callable[[LoopReads], Awaitable[ResultT]]
ECHO = "SELECT $1::text"
PID = "SELECT pg_backend_pid()::text"


@pytest.fixture
def url(postgresql_url: str) -> str:
    return postgresql_url.replace("+psycopg", "")


@asynccontextmanager
async def reading(url: str) -> AsyncIterator[LoopReads]:
    reads = LoopReads(lambda: psycopg.connect(url, autocommit=True))
    try:
        yield reads
    finally:
        reads.close()


def run(url: str, ask: Ask[ResultT]) -> ResultT:
    async def whole() -> ResultT:
        async with reading(url) as reads:
            return await ask(reads)

    return asyncio.run(whole())


def test_each_of_many_gets_its_own_answer(url: str) -> None:
    async def ask(reads: LoopReads) -> tuple[list[str | None], set[str | None]]:
        told = await asyncio.gather(
            *(reads.text(f"SELECT $1 || pg_sleep({n % 3} / 1000.0)", [f"{n} é"]) for n in range(60))
        )
        return told, set(await asyncio.gather(*(reads.text(PID, []) for _ in range(20))))

    told, backends = run(url, ask)
    assert told == [f"{n} é" for n in range(60)]
    assert len(backends) <= CONNECTIONS


def test_nothing_and_much_are_told(url: str) -> None:
    async def ask(reads: LoopReads) -> tuple[str | None, str | None]:
        return await reads.text("SELECT NULL::text", []), await reads.text("SELECT repeat($1, 3000000)", ["äb"])

    assert run(url, ask) == (None, "äb" * 3_000_000)


def test_what_is_refused_is_said_and_the_next_is_answered(url: str) -> None:
    async def ask(reads: LoopReads) -> str | None:
        with pytest.raises(psycopg.errors.UndefinedTable):
            await reads.text("SELECT 1 FROM nowhere", [])
        with pytest.raises(psycopg.errors.DivisionByZero):
            await reads.text("SELECT (1 / $1::int)::text", ["0"])
        return await reads.text(ECHO, ["after"])

    assert run(url, ask) == "after"


def test_a_connection_that_was_ended_meanwhile_is_replaced(url: str) -> None:
    async def ask(reads: LoopReads) -> tuple[str | None, str | None]:
        first = await reads.text(PID, [])
        end(url, first)
        await asyncio.sleep(0.1)
        return first, await reads.text(PID, [])

    first, second = run(url, ask)
    assert second is not None
    assert second != first


def test_a_connection_that_ends_while_it_is_asked_says_so(url: str) -> None:
    async def ask(reads: LoopReads) -> str | None:
        first = await reads.text(PID, [])
        sleeping = asyncio.ensure_future(reads.text("SELECT pg_sleep(60)::text", []))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(end, url, first)
        with pytest.raises(psycopg.OperationalError):
            await sleeping
        return await reads.text(ECHO, ["after"])

    assert run(url, ask) == "after"


def test_a_database_that_says_nothing_is_waited_for_so_long(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_reads, "ANSWER_S", 0.2)

    async def ask(reads: LoopReads) -> str | None:
        with pytest.raises(psycopg.OperationalError, match="does not answer"):
            await reads.text("SELECT pg_sleep(2)::text", [])
        return await reads.text(ECHO, ["after"])

    assert run(url, ask) == "after"


def test_who_goes_away_leaves_no_answer_to_the_next(url: str) -> None:
    async def ask(reads: LoopReads) -> list[str | None]:
        gone = [asyncio.ensure_future(reads.text("SELECT $1 || pg_sleep(0.1)", ["gone"])) for _ in range(CONNECTIONS)]
        await asyncio.sleep(0.05)
        for one in gone:
            one.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        return [await reads.text(ECHO, [str(n)]) for n in range(8)]

    assert run(url, ask) == [str(n) for n in range(8)]


def test_a_connection_that_is_opened_for_who_went_away_is_closed(url: str) -> None:
    opened: list[psycopg.Connection] = []

    def connect() -> psycopg.Connection:
        time.sleep(0.1)
        opened.append(psycopg.connect(url, autocommit=True))
        return opened[-1]

    async def whole() -> None:
        reads = LoopReads(connect)
        asking = asyncio.ensure_future(reads.text(ECHO, ["x"]))
        await asyncio.sleep(0.02)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0.5)

    asyncio.run(whole())
    assert [one.closed for one in opened] == [True]


def test_answers_come_whole_by_tls(tmp_path: Path) -> None:
    """What a record holds beyond what was read must not lie there until more comes."""

    def connect(url: str) -> psycopg.Connection:
        found = psycopg.connect(f"{url}?sslmode=require", autocommit=True)
        assert found.pgconn.ssl_in_use
        return found

    async def ask(url: str) -> None:
        reads = LoopReads(lambda: connect(url))
        for size in (1, 8_000, 16_384, 33_000, 9_000_001):
            assert await reads.text("SELECT repeat('x', $1::int)", [str(size)]) == "x" * size
        asked = [reads.text("SELECT repeat('y', $1::int)", [str(1000 * n)]) for n in range(100)]
        assert [len(one or "") for one in await asyncio.gather(*asked)] == [1000 * n for n in range(100)]
        reads.close()

    with postgresql(durable=False) as found:
        url = found.replace("+psycopg", "")
        speak_tls(url, FleetCa.open(tmp_path, "default"))
        asyncio.run(ask(url))


def speak_tls(url: str, ca: FleetCa) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    issued = ca.issue_server(key.public_key(), ["localhost"], "default")
    with psycopg.connect(url, autocommit=True) as connection:
        data = Path(connection.execute("SHOW data_directory").fetchone()[0])  # type: ignore[index]
        for name, text in (("server.key", key_pem(key)), ("server.crt", issued.pem)):
            (data / name).write_text(text)
            (data / name).chmod(0o600)
            shutil.chown(data / name, data.owner(), data.group())
        connection.execute("ALTER SYSTEM SET ssl = on")
        connection.execute("SELECT pg_reload_conf()")
        wait_until("TLS", lambda: connection.execute("SHOW ssl").fetchone() == ("on",))


def test_another_loop_has_connections_of_its_own(url: str) -> None:
    reads = LoopReads(lambda: psycopg.connect(url, autocommit=True))
    assert [asyncio.run(reads.text(ECHO, [str(n)])) for n in range(3)] == ["0", "1", "2"]
    reads.close()


def test_nobody_to_connect_to_is_said(url: str) -> None:
    async def ask(reads: LoopReads) -> None:
        for _ in range(CONNECTIONS + 1):
            with pytest.raises(psycopg.OperationalError):
                await reads.text(ECHO, ["x"])

    run("postgresql://127.0.0.1:1/none", ask)


def end(url: str, backend: str | None) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s)", [int(backend or 0)])
    time.sleep(0.05)
