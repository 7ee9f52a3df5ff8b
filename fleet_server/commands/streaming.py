"""The log of a command as server-sent events (the HTML standard's `text/event-stream`).

    id: 4711                            the line's sequence: give it back as Last-Event-ID to go on after it
    event: line
    data: {"sequence": 4711, …}

    event: end                          the command is over, and all lines that came were sent
    data: {"id": …, "state": …}

Lines are read from the database a few times a second, so that any server of several can stream them.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fleet_server.commands import repository
from fleet_server.commands.service import command_view, line_view
from fleet_server.db import Database
from fleet_server.domain.commands import ENDED, CommandState
from fleet_server.errors import UnavailableError
from fleet_server.models import DeviceCommand

MOST = 64
LOOK_S = 0.4
ALIVE_S = 15.0
PIECE = 500


class Streams:
    """Everybody who follows a log at this server.

    Args:
        database: where the lines are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._open = 0
        self._lock = threading.Lock()
        self._stopping = False

    @property
    def stopping(self) -> bool:
        """Whether this server is about to end."""
        return self._stopping

    def stop(self) -> None:
        """End them all: clients go on at the server that comes next."""
        self._stopping = True

    def answer(self, command_id: str, after: int) -> StreamingResponse:
        """The events of a command's log after a line, until the command is over.

        Args:
            command_id: of a command that the caller may read.
            after: sequence of the last line that the client has; 0 for none.

        Raises:
            UnavailableError: when too many follow.
        """
        with self._lock:
            if self._open >= MOST:
                detail = f"{MOST} programs follow logs here already: end one, or read the lines page by page"
                raise UnavailableError("too_many_streams", detail)
            self._open += 1
        return _Following(self._follow(command_id, after), self._left)

    def _left(self) -> None:
        with self._lock:
            self._open -= 1

    async def _follow(self, command_id: str, after: int) -> AsyncIterator[str]:
        said_at = time.monotonic()
        while not self._stopping:
            text, after, over = await run_in_threadpool(self._events, command_id, after)
            if text or time.monotonic() - said_at >= ALIVE_S:
                said_at = time.monotonic()
                yield text or ": nothing new\n\n"
            if over:
                return
            if not text:
                await asyncio.sleep(LOOK_S)

    def _events(self, command_id: str, after: int) -> tuple[str, int, bool]:
        """What there is; up to which line that is; and whether it is all there will be."""
        with self._database.read() as session:
            row = session.get(DeviceCommand, command_id)  # before the lines: what came before its end is among them
            lines = repository.lines_after(session, command_id, after, PIECE)
            views = [line_view(one) for one in lines]
            over = row is None or CommandState(row.state) in ENDED
            ends = over and len(lines) < PIECE
            last = command_view(row).model_dump(mode="json") if ends and row is not None else None
        events = [_event("line", one.model_dump(mode="json"), one.sequence) for one in views]
        if last is not None:
            events.append(_event("end", last, None))
        return "".join(events), views[-1].sequence if views else after, ends


class _Following(StreamingResponse):
    """The answer to one who follows.

    Args:
        events: the body.
        left: called once, however it ends.
    """

    def __init__(self, events: AsyncIterator[str], left: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


def _event(kind: str, data: object, sequence: int | None) -> str:
    key = "" if sequence is None else f"id: {sequence}\n"
    return f"{key}event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
