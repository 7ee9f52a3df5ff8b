"""Server-sent events that tell a page that what it shows has changed: it then fetches the part anew.

The API is asked here, again and again, for what the page shows: a page that is open costs one connection and is sent
nothing while nothing happens, whichever server a change was made by. Pages that one person has open of the same thing
share what is asked: a hundred of them cost as much as one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from fleet_server.web.api import Api

LOOK_S = 2.0
WHO = ("authorization", "x-shoal-fleet")  # of a request: pages share only with those of the same person and fleet
KEEP_S = 20.0  # after so long without a word, proxies think that nobody is there
LONGEST_S = 3600.0  # then the browser connects anew, and is asked who it is
CHANGED = b"event: changed\ndata: \n\n"
Prints = list[bytes]
router = APIRouter(include_in_schema=False)


@dataclass
class _Shared:
    pages: int = 0
    turn: int = -1
    asked: asyncio.Future[Prints] | None = None


class Looks:
    """What open pages ask, each once in a turn of `LOOK_S`, for all that want the same."""

    def __init__(self) -> None:
        self._shared: dict[Hashable, _Shared] = {}

    def __len__(self) -> int:
        """How many different things are looked at."""
        return len(self._shared)

    @contextmanager
    def page(self, key: Hashable) -> Iterator[None]:
        """A page is open meanwhile.

        Args:
            key: who looks at what: those that are equal share.
        """
        self._shared.setdefault(key, _Shared()).pages += 1
        try:
            yield
        finally:
            self._shared[key].pages -= 1
            if not self._shared[key].pages:
                del self._shared[key]

    async def look(self, key: Hashable, now: float, ask: Callable[[], Awaitable[Prints]]) -> Prints:
        """What there is in this turn: who comes first asks, and the others get the same answer.

        Args:
            key: of an open page.
            now: of a clock that is never set, in seconds.
            ask: asks the API.
        """
        shared, turn = self._shared[key], turn_of(key, now)
        if shared.asked is None or shared.turn != turn:
            shared.turn, shared.asked = turn, asyncio.ensure_future(ask())
        return await asyncio.shield(shared.asked)


def turn_of(key: Hashable, now: float) -> int:
    """The number of a turn; those of other keys begin at other moments, so that not all is asked at once."""
    return int((now + _phase_s(key)) // LOOK_S)


def until_next(key: Hashable, now: float) -> float:
    """Seconds until the next turn begins."""
    return LOOK_S - (now + _phase_s(key)) % LOOK_S


def _phase_s(key: Hashable) -> float:
    return hash(key) % 1024 / 1024 * LOOK_S


@router.get("/ui/live")
async def live(
    request: Request, watch: Annotated[list[str], Query(max_length=8, description="Paths below /api/v1.")]
) -> StreamingResponse:
    """An event `changed` at first, and each time that one of some paths says something else."""
    events = _events(request, [path if path.startswith("/") else f"/{path}" for path in watch])
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(request: Request, paths: list[str]) -> AsyncIterator[bytes]:
    api = Api(request)
    looks: Looks = request.app.state.page_looks
    key = (*(request.headers.get(name, "") for name in WHO), *paths)

    def look() -> Awaitable[Prints]:
        return looks.look(key, time.monotonic(), lambda: _fingerprints(api, paths))

    with looks.page(key):
        known = await look()
        yield CHANGED  # what happened between the page and this, or while the browser was away, nobody saw
        said = began = time.monotonic()
        while time.monotonic() - began < LONGEST_S and not await request.is_disconnected():
            await asyncio.sleep(until_next(key, time.monotonic()))
            if request.app.state.log_streams.stopping:
                return  # the browser connects anew by itself: to the server that comes next
            now = await look()
            if now != known:
                known, said = now, time.monotonic()
                yield CHANGED
            elif time.monotonic() - said >= KEEP_S:
                said = time.monotonic()
                yield b": still here\n\n"


async def _fingerprints(api: Api, paths: list[str]) -> Prints:
    return list(await asyncio.gather(*(api.fingerprint(path) for path in paths)))
