"""Server-sent events that tell a page that what it shows has changed: it then fetches the part anew.

The API is asked here, again and again, for what the page shows: a page that is open costs one connection and is sent
nothing while nothing happens, whichever server a change was made by.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from fleet_server.web.api import Api

LOOK_S = 2.0
KEEP_S = 20.0  # after so long without a word, proxies think that nobody is there
LONGEST_S = 3600.0  # then the browser connects anew, and is asked who it is
router = APIRouter(include_in_schema=False)


@router.get("/ui/live")
async def live(
    request: Request, watch: Annotated[list[str], Query(max_length=8, description="Paths below /api/v1.")]
) -> StreamingResponse:
    """An event `changed` each time that one of some paths says something else."""
    events = _events(request, [path if path.startswith("/") else f"/{path}" for path in watch])
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(request: Request, paths: list[str]) -> AsyncIterator[bytes]:
    api = Api(request)
    known = await _fingerprints(api, paths)
    yield b": watching\n\n"
    silent = elapsed = 0.0
    while elapsed < LONGEST_S and not await request.is_disconnected():
        await asyncio.sleep(LOOK_S)
        if request.app.state.log_streams.stopping:
            return  # the browser connects anew by itself: to the server that comes next
        silent, elapsed = silent + LOOK_S, elapsed + LOOK_S
        now = await _fingerprints(api, paths)
        if now != known:
            known, silent = now, 0.0
            yield b"event: changed\ndata: \n\n"
        elif silent >= KEEP_S:
            silent = 0.0
            yield b": still here\n\n"


async def _fingerprints(api: Api, paths: list[str]) -> list[bytes]:
    return list(await asyncio.gather(*(api.fingerprint(path) for path in paths)))
