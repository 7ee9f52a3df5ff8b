"""The short way: what is asked all the time is answered past FastAPI, where that has nothing to add.

It knows one list, that of devices by id. A request that it does not wholly understand, that it may not answer or that
fails goes the long way, by the endpoint, which says what is wrong. Both answer alike; a test holds them to it. The ids
of requests, headers, metrics and traces are those of the middlewares around it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from urllib.parse import parse_qsl, quote_plus, urlencode

from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.protocol.logs import note_ids
from fleet_server.access import policy
from fleet_server.access.authentication import Proof
from fleet_server.access.authorization import identify
from fleet_server.db import Database
from fleet_server.devices import repository
from fleet_server.devices.listing import Page, Wanted, await_page, read_page
from fleet_server.errors import FleetError
from fleet_server.instruments import Instruments
from fleet_server.paging import decode_cursor
from fleet_server.preconditions import entity_tag, none_match
from fleet_server.schemas import PAGE_LIMIT

log = logging.getLogger(__name__)
PATH = "/api/v1/devices"
ACTION = "list_devices"
READERS = 4
AT_ONCE = 100  # devices: SQLite reads them in less time than going to a thread takes, and waits for no writer
_ROUTE = SimpleNamespace(path=PATH, name=ACTION)
_HEADERS = frozenset({b"authorization", b"x-shoal-fleet", b"if-none-match"})
_PARAMETERS = frozenset({"limit", "sort", "cursor", "profile", "online"})
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Answer:
    """What goes back."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class ShortWay:
    """ASGI middleware that answers some requests itself.

    Args:
        app: answers all others.
        state: of the application.
    """

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="short-way")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        answer = None
        if scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "GET" and not scope["root_path"]:
            answer = await self._answer(scope)
        if answer is None:
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body})

    async def _answer(self, scope: Scope) -> Answer | None:
        """None for the long way."""
        wanted, given = read(scope["query_string"]), _given(scope["headers"])
        if wanted is None or given is None:
            return None
        proof = Proof(given.get(b"authorization"), given.get(b"x-shoal-fleet"))
        database: Database = self._state.database
        try:
            principal = await identify(self._state, database, proof)
            policy.check(principal, ACTION)
            self._state.request_limits.count_principal(principal.id)
        except FleetError:
            return None  # the long way finds the same, and says so
        note_ids(fleet=principal.fleet_id)
        try:
            page = await self._page(principal.fleet_id, wanted)
        except Exception as error:  # noqa: BLE001 (the long way says what is wrong with the database)
            log.warning("the short way failed: %s", error)
            return None
        scope["route"] = _ROUTE
        tag = entity_tag(page.body, None)
        etag = (b"etag", tag.encode())
        if none_match(given.get(b"if-none-match"), tag):
            return Answer(304, [etag], b"")
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(page.body)), etag]
        if page.cursor is not None:
            headers.append((b"link", _following(scope["query_string"], page.cursor)))
        return Answer(200, headers, page.body)

    async def _page(self, fleet_id: str, wanted: Wanted) -> Page:
        database: Database = self._state.database
        started = time.perf_counter()
        if not database.is_sqlite:
            page = await await_page(database.reads, fleet_id, wanted)
        elif wanted.limit <= AT_ONCE:
            page = read_page(database, fleet_id, wanted)
        else:
            loop = asyncio.get_running_loop()
            page = await loop.run_in_executor(self._readers, read_page, database, fleet_id, wanted)
        instruments: Instruments = self._state.instruments
        instruments.statements.labels("select").observe(time.perf_counter() - started)
        return page


def _given(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, str] | None:
    """The headers that count; None where one is there twice."""
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in _HEADERS:
            if name in found:
                return None
            found[name] = value.decode("latin-1")
    return found


@lru_cache(maxsize=1024)
def read(query: bytes) -> Wanted | None:
    """Which page a query string asks for; None for one that needs the long way."""
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    given = dict(pairs)
    limit, online, sort = given.get("limit", "50"), given.get("online"), given.get("sort", "id")
    if len(given) != len(pairs) or not given.keys() <= _PARAMETERS or sort not in {"id", "-id"}:
        return None
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= PAGE_LIMIT):
        return None
    if online is not None and online not in _TRUTH:
        return None
    try:
        after = str(decode_cursor(repository.DEVICES, given["cursor"], sort)[1]) if given.get("cursor") else None
    except FleetError:
        return None
    return Wanted(int(limit), sort == "-id", after, given.get("profile"), None if online is None else _TRUTH[online])


def _following(query: bytes, cursor: str) -> bytes:
    return f'<{PATH}?{_without_cursor(query)}cursor={quote_plus(cursor)}>; rel="next"'.encode()


@lru_cache(maxsize=1024)
def _without_cursor(query: bytes) -> str:
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    kept = urlencode([pair for pair in pairs if pair[0] != "cursor"])
    return f"{kept}&" if kept else ""
