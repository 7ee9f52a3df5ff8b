"""Lists: keyset paging, sorting by a closed set of fields, and the filters by name and time that most lists have.

A cursor holds the sort, the sort's value in the last row shown, and that row's unique key, so that rows that are alike
in the sort are neither shown twice nor left out. Ids of rows are UUIDs of version 7: where a list is sorted by time of
creation, the id is that time, and its index serves the sort.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import inspect
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from fastapi import Query, Request, Response
from pydantic import BaseModel
from sqlalchemy import ColumnElement, Select, literal, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session
from typing_extensions import TypeVarTuple

from fleet_server.errors import InvalidError
from fleet_server.schemas import PAGE_LIMIT, Page

CURSOR_CHARS = 2048
RowT = TypeVar("RowT")
ViewT = TypeVar("ViewT", bound=BaseModel)
Ts = TypeVarTuple("Ts")
Column = ColumnElement[Any] | InstrumentedAttribute[Any]
Key = str | int | float | dt.datetime


@dataclass(frozen=True)
class PageRequest:
    """Which page of a list was asked for.

    Attributes:
        limit: most rows of it.
        sort: one of the list's sorts; a `-` before its name turns it round. The list's own when it is empty.
        after: sort's value and unique key of the last row before it.
        name: only rows of this name; a `*` stands for any characters.
        since: only rows of this time or later.
        until: only rows before this time.
        announce: takes the cursor of the page after it.
    """

    limit: int
    sort: str = ""
    after: tuple[Key, Key] | None = None
    name: str | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None
    announce: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Rows(Generic[RowT]):
    """The rows of a page, and the cursor of the next one where there is one."""

    items: Sequence[RowT]
    cursor: str | None


class _Sorted:
    """What both kinds of list have: the names of their sorts, and types by which a cursor is told from rubbish."""

    named = False  # whether they have the filter `name`
    times: str | None = None  # what stands before `since` and `until`, where they have these filters

    def __init__(self, default: str, sorts: Iterable[str]) -> None:
        self.default = default
        self.sorts = [name for one in sorts for name in (one, f"-{one}")]

    def types(self, sort: str) -> tuple[type, type]:
        """Types of a sort's value and of the unique key."""
        raise NotImplementedError


class TableList(_Sorted):
    """A list of rows of the database.

    Args:
        unique: the column that tells rows apart which are alike in the sort.
        sorts: what it may be sorted by; columns that are never null.
        default: the sort when none is asked for.
        name: the column of the filter `name`.
        time: the column of the filters by time.
        times: what stands before the names of those: `created_` makes `created_since` and `created_until`.
    """

    def __init__(
        self,
        unique: Column,
        sorts: Mapping[str, Column],
        *,
        default: str,
        name: Column | None = None,
        time: Column | None = None,
        times: str = "created_",
    ) -> None:
        super().__init__(default, sorts)
        self._unique, self._columns = unique, dict(sorts)
        self._name, self._time = name, time
        self.named, self.times = name is not None, times if time is not None else None

    def types(self, sort: str) -> tuple[type, type]:
        """Types of a sort's value and of the unique key."""
        return self._columns[sort.removeprefix("-")].type.python_type, self._unique.type.python_type

    def scalars(self, session: Session, query: Select[RowT], request: PageRequest) -> Rows[RowT]:
        """A page of a query for one entity; the query has neither order nor limit."""
        found = self.rows(session, query, request)
        return Rows([row[0] for row in found.items], found.cursor)

    def rows(self, session: Session, query: Select[*Ts], request: PageRequest) -> Rows[tuple[*Ts]]:
        """A page of a query for several entities."""
        sort = request.sort or self.default
        column, unique = self._columns[sort.removeprefix("-")], self._unique
        keys: tuple[Column, ...] = (unique,) if column is unique else (column, unique)
        query = self._narrowed(query, request)
        if request.after is not None:
            bounds = [literal(value, one.type) for value, one in zip(request.after[-len(keys) :], keys, strict=True)]
            place, bound = tuple_(*keys), tuple_(*bounds)
            query = query.where(place < bound if sort.startswith("-") else place > bound)
        query = query.order_by(*(one.desc() if sort.startswith("-") else one.asc() for one in keys))
        found = session.execute(query.add_columns(column, unique).limit(request.limit + 1)).all()
        shown = found[: request.limit]
        cursor = encode_cursor(sort, shown[-1][-2], shown[-1][-1]) if len(found) > request.limit else None
        return Rows([tuple(row[:-2]) for row in shown], cursor)

    def _narrowed(self, query: Select[*Ts], request: PageRequest) -> Select[*Ts]:
        if request.name is not None and self._name is not None:
            query = query.where(matches(self._name, request.name))
        if self._time is not None and request.since is not None:
            query = query.where(self._time >= request.since)
        if self._time is not None and request.until is not None:
            query = query.where(self._time < request.until)
        return query


class ComputedList(_Sorted, Generic[RowT]):
    """A list that is made in memory, such as one of sums.

    Args:
        unique: the text that tells a row from all others.
        sorts: what it may be sorted by.
        default: the sort when none is asked for.
    """

    def __init__(
        self, unique: Callable[[RowT], str], sorts: Mapping[str, Callable[[RowT], str | int]], *, default: str
    ) -> None:
        super().__init__(default, sorts)
        self._unique, self._values = unique, dict(sorts)

    def types(self, sort: str) -> tuple[type, type]:  # noqa: ARG002
        """Types of a sort's value and of the unique key."""
        return object, str

    def page(self, rows: Iterable[RowT], request: PageRequest) -> Rows[RowT]:
        """A page of all the rows."""
        sort = request.sort or self.default
        value, turned = self._values[sort.removeprefix("-")], sort.startswith("-")

        def place(row: RowT) -> tuple[Any, str]:
            return value(row), self._unique(row)

        found = sorted(rows, key=place, reverse=turned)
        if request.after is not None:
            after: Any = request.after
            try:
                found = [row for row in found if (place(row) < after if turned else place(row) > after)]
            except TypeError:
                raise _bad_cursor() from None
        shown = found[: request.limit]
        return Rows(shown, encode_cursor(sort, *place(shown[-1])) if len(found) > request.limit else None)


def matches(column: Column, text: str) -> ColumnElement[bool]:
    """Whether a column is a text, in which a `*` stands for any characters."""
    if "*" not in text:
        return column == text
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_").replace("*", "%")
    return column.like(escaped, escape="\\")


def encode_cursor(sort: str, value: Key, unique: Key) -> str:
    """The opaque cursor of a row."""
    plain = value.isoformat() if isinstance(value, dt.datetime) else value
    return base64.urlsafe_b64encode(msgspec.json.encode([sort, plain, unique])).decode().rstrip("=")


def decode_cursor(listing: _Sorted, cursor: str, sort: str) -> tuple[Key, Key]:
    """A sort's value and the unique key in a cursor.

    Raises:
        InvalidError: when the cursor is none of this list, or one of another sort.
    """
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
        made, value, unique = json.loads(text)
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise _bad_cursor() from None
    if made not in listing.sorts or len(cursor) > CURSOR_CHARS or "\\u0000" in text or "\0" in text:
        raise _bad_cursor()
    if made != sort:
        detail = f"cursor: it is of sort={made}, and this asks for sort={sort}: begin again without it"
        raise InvalidError("cursor_of_other_sort", detail, field="cursor")
    types = listing.types(sort)
    return _key(value, types[0]), _key(unique, types[1])


def _key(value: Any, wanted: type) -> Key:
    if wanted is dt.datetime and isinstance(value, str):
        try:
            found = dt.datetime.fromisoformat(value)
        except ValueError:
            raise _bad_cursor() from None
        if found.tzinfo is not None:
            return found
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise _bad_cursor()  # no database has such numbers
    elif isinstance(value, (str, int, float)) and isinstance(value, wanted) and not isinstance(value, bool):
        return value
    raise _bad_cursor()


def _bad_cursor() -> InvalidError:
    return InvalidError("bad_cursor", "cursor: not one this list gave; begin again without it", field="cursor")


def in_utc(time: dt.datetime | None, field: str) -> dt.datetime | None:
    """In UTC, which is what a time without a zone means.

    Raises:
        InvalidError: for a time that UTC has none for.
    """
    try:
        return (
            time if time is None else (time.replace(tzinfo=dt.UTC) if time.tzinfo is None else time.astimezone(dt.UTC))
        )
    except OverflowError:
        raise InvalidError("bad_time", f"{field}: no such time; give one of the years 2 to 9998", field=field) from None


def paged(listing: _Sorted) -> Callable[..., Coroutine[Any, Any, PageRequest]]:
    """The FastAPI dependency that reads which page of a list is asked for, with the parameters that the list has."""
    prefix = listing.times or ""

    async def asked(request: Request, response: Response, limit: int, sort: str, **given: Any) -> PageRequest:
        def announce(following: str) -> None:
            """As a path, so that it holds behind a proxy too."""
            url = request.url.include_query_params(cursor=following)
            response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'

        cursor = given.get("cursor")
        return PageRequest(
            limit,
            sort,
            decode_cursor(listing, cursor, sort) if cursor else None,
            given.get("name"),
            in_utc(given.get(f"{prefix}since"), f"{prefix}since"),
            in_utc(given.get(f"{prefix}until"), f"{prefix}until"),
            announce,
        )

    parameters: list[tuple[str, Any, Any]] = [
        ("request", Request, inspect.Parameter.empty),
        ("response", Response, inspect.Parameter.empty),
        ("cursor", Annotated[str | None, Query(description="`next_cursor` of the page before.")], None),
        ("limit", Annotated[int, Query(ge=1, le=PAGE_LIMIT, description="Rows a page.")], 50),
        (
            "sort",
            Annotated[Literal[tuple(listing.sorts)], Query(description="A `-` before a field turns it round.")],
            listing.default,
        ),
    ]
    if listing.named:
        said = "Only those of this name; a `*` stands for any characters."
        parameters.append(("name", Annotated[str | None, Query(max_length=256, description=said)], None))
    if listing.times is not None:
        what = "Only those made" if listing.times else "Only those of"
        for one, said in (("since", f"{what} at this time or later."), ("until", f"{what} before this time.")):
            parameters.append((f"{prefix}{one}", Annotated[dt.datetime | None, Query(description=said)], None))
    kind = inspect.Parameter.KEYWORD_ONLY
    asked.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind, annotation=what, default=default) for name, what, default in parameters]
    )
    return asked


def page(rows: Rows[RowT], request: PageRequest, view: Callable[[RowT], ViewT]) -> Page[ViewT]:
    """The HTTP shape of a page, with its `Link` header."""
    if rows.cursor is not None:
        request.announce(rows.cursor)
    return Page[Any](items=[view(row) for row in rows.items], next_cursor=rows.cursor)
