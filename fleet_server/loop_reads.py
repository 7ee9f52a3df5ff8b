"""Single statements that read from PostgreSQL, waited for by the event loop.

A thread that waits in its stead is woken for every piece of an answer and takes the interpreter from the loop each
time: that costs as much processor time as a page of devices takes to be read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult

CONNECTIONS = 4  # of a server: what is read so takes a millisecond
ANSWER_S = 30.0


class LoopReads:
    """Connections beside SQLAlchemy and its pool, that say nothing but statements prepared once.

    Args:
        connect: makes one that is this one's alone, in which every statement is a transaction.
    """

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]]) -> None:
        self._connect = connect
        self._idle: list[_Connection] = []
        self._free = asyncio.Semaphore(CONNECTIONS)

    async def text(self, statement: str, given: Sequence[str]) -> str | None:
        """The one value that a statement finds, as text.

        Args:
            statement: of one row and one column, with its parameters as `$1`.
            given: their values.

        Raises:
            psycopg.OperationalError: where the database can't be asked, or said nothing for `ANSWER_S`.
            psycopg.Error: as it refuses the statement. That connection is not used again.
        """
        async with self._free:
            connection = await self._take()
            try:
                found = await connection.ask(statement, given)
            except BaseException:
                connection.close()
                raise
            self._idle.append(connection)
            return found

    async def _take(self) -> _Connection:
        loop = asyncio.get_running_loop()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable_by(loop):
                return connection
            connection.close()
        opened = loop.run_in_executor(None, self._connect)
        try:
            return _Connection(await asyncio.shield(opened), loop)
        except asyncio.CancelledError:
            opened.add_done_callback(_close_opened)
            raise

    def close(self) -> None:
        """Close the connections: nobody asks any more."""
        while self._idle:
            self._idle.pop().close()


class _Connection:
    """One connection, that has one statement at a time."""

    def __init__(self, connection: psycopg.Connection[Any], loop: asyncio.AbstractEventLoop) -> None:
        self._connection = connection  # which ends the link when nobody has it
        self._pg: PGconn = connection.pgconn
        self._encoding = connection.info.encoding
        self._loop = loop
        self._names: dict[str, bytes] = {}
        self._results: list[PGresult] = []
        self._answer: asyncio.Future[list[PGresult]] | None = None
        self._broken = False
        self._pg.nonblocking = 1
        self._socket = self._pg.socket
        loop.add_reader(self._socket, self._readable)

    def usable_by(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether it may be asked by this loop, and nobody has ended it."""
        return self._loop is loop and not self._broken

    async def ask(self, statement: str, given: Sequence[str]) -> str | None:
        name = self._names.get(statement)
        if name is None:
            name = b"read_%d" % len(self._names)
            self._pg.send_prepare(name, statement.encode(self._encoding))
            await self._results_of(ExecStatus.COMMAND_OK)
            self._names[statement] = name
        self._pg.send_query_prepared(name, [one.encode(self._encoding) for one in given])
        value = (await self._results_of(ExecStatus.TUPLES_OK)).get_value(0, 0)
        return None if value is None else value.decode(self._encoding)

    async def _results_of(self, expected: ExecStatus) -> PGresult:
        if self._pg.flush():
            raise psycopg.OperationalError("the database takes no statements")
        answer: asyncio.Future[list[PGresult]] = self._loop.create_future()
        self._answer = answer
        late = self._loop.call_later(ANSWER_S, self._fail, psycopg.OperationalError("the database does not answer"))
        try:
            results = await answer
        finally:
            late.cancel()
            self._answer = None
        for one in results:
            if one.status != expected:
                raise psycopg.errors.error_from_result(one, self._encoding)
        (result,) = results
        return result

    def _readable(self) -> None:
        """Take what came; give the answer to who waits once it is whole."""
        try:
            self._pg.consume_input()
            if self._answer is None:
                return  # a notice, between statements
            while not self._pg.is_busy():
                one = self._pg.get_result()
                if one is None:
                    results, self._results = self._results, []
                    if not self._answer.done():
                        self._answer.set_result(results)
                    return
                self._results.append(one)
        except psycopg.Error as error:
            self._fail(error)

    def _fail(self, error: psycopg.Error) -> None:
        self._stop()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    def _stop(self) -> None:
        if not self._broken:
            self._broken = True
            if not self._loop.is_closed():
                self._loop.remove_reader(self._socket)

    def close(self) -> None:
        self._stop()
        self._connection.close()


def _close_opened(opened: asyncio.Future[psycopg.Connection[Any]]) -> None:
    """Of a connection that nobody waits for any more."""
    if not opened.cancelled() and opened.exception() is None:
        opened.result().close()
