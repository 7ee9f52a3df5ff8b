"""What every endpoint shares: sessions, who calls and in which fleet, and keyset paging. It knows HTTP and no subject.

A writing session commits when the endpoint function ends and before the answer is sent (FastAPI's `scope="function"`),
so that a client that has its answer can rely on it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Query, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from fleet_server.db import Database
from fleet_server.errors import FleetError, InvalidError
from fleet_server.principals import Actor as ActorOfRequest
from fleet_server.principals import Principal
from fleet_server.schemas import PAGE_LIMIT, Digest, Name, Page
from fleet_server.settings import Settings

CURSOR_CHARS = 512
RowT = TypeVar("RowT")
ViewT = TypeVar("ViewT", bound=BaseModel)


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _read_session(request: Request) -> Iterator[Session]:
    with _database(request).read() as session:
        yield session


def _write_session(request: Request) -> Iterator[Session]:
    with _database(request).write() as session:
        yield session


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def current_principal(request: Request) -> Principal:
    """Who sent the request, as the check before every endpoint found out.

    Raises:
        FleetError: where there was no such check: then nobody may.
    """
    principal: Principal | None = getattr(request.state, "principal", None)
    if principal is None:
        raise FleetError("not_checked", "this endpoint does not check who asks, so nobody may: report this defect")
    return principal


def _fleet_id(request: Request) -> str:
    return current_principal(request).fleet_id


def origin(request: Request) -> ActorOfRequest:
    """Where a request comes from, when it is not known from whom."""
    address = request.client.host if request.client else ""
    return ActorOfRequest("", "", address, request.state.request_id)


def _actor(request: Request) -> ActorOfRequest:
    principal = current_principal(request)
    return replace(origin(request), name=principal.name, id=principal.id)


@dataclass(frozen=True)
class PageRequest:
    """Which page was asked for: rows after the key `after`, at most `limit` of them."""

    after: str | None
    limit: int
    announce: Callable[[str], None] = lambda _: None  # of the next page's cursor


def encode_cursor(key: str) -> str:
    """The opaque cursor of a row's key."""
    return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """The key in a cursor.

    Raises:
        InvalidError: when the cursor is none of ours.
    """
    try:
        key = base64.b64decode(
            cursor[:CURSOR_CHARS] + "=" * (-len(cursor[:CURSOR_CHARS]) % 4), altchars=b"-_", validate=True
        ).decode()
    except (binascii.Error, ValueError):
        key = "\0"
    if "\0" in key:
        raise InvalidError("bad_cursor", "cursor: not one this server gave; begin again without it", field="cursor")
    return key


def _paging(
    request: Request,
    response: Response,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_LIMIT, description="Rows a page.")] = 50,
) -> PageRequest:
    def announce(following: str) -> None:
        """As a path, so that it holds behind a proxy too."""
        url = request.url.include_query_params(cursor=following)
        response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'

    return PageRequest(decode_cursor(cursor) if cursor else None, limit, announce)


def page(
    rows: Sequence[RowT], request: PageRequest, view: Callable[[RowT], ViewT], *, key: Callable[[RowT], str]
) -> Page[ViewT]:
    """Make a page of rows that were queried with `limit + 1`: the extra one only says that there are more."""
    shown = rows[: request.limit]
    cursor = encode_cursor(key(shown[-1])) if len(rows) > request.limit else None
    if cursor is not None:
        request.announce(cursor)
    return Page[Any](items=[view(row) for row in shown], next_cursor=cursor)


ReadSession = Annotated[Session, Depends(_read_session, scope="function")]
WriteSession = Annotated[Session, Depends(_write_session, scope="function")]
Db = Annotated[Database, Depends(_database)]
AppSettings = Annotated[Settings, Depends(_settings)]
FleetId = Annotated[str, Depends(_fleet_id)]
Actor = Annotated[ActorOfRequest, Depends(_actor)]
Origin = Annotated[ActorOfRequest, Depends(origin)]
CurrentPrincipal = Annotated[Principal, Depends(current_principal)]
Paging = Annotated[PageRequest, Depends(_paging)]
DeviceId = Annotated[str, Path(description="The device's id.", examples=["camera-01"])]
ProfileName = Annotated[str, Path(description="The profile's name.", examples=["rpi5-litert"])]
ModelName = Annotated[str, Path(description="The model's name.", examples=["mnist"])]
NewModelName = Annotated[Name, Path(description="The model's name; it is made when it is not there.")]
ArtifactDigest = Annotated[Digest, Path()]
VersionName = Annotated[str, Path(description="The version's name within its model.", examples=["2"])]
VariantId = Annotated[str, Path(description="The variant's id.")]
RolloutId = Annotated[str, Path(description="The rollout's id.")]
