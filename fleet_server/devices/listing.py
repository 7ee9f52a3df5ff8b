"""A page of the list of devices, from the driver's rows to JSON: what pages and programs ask for more than all else.

It answers as `endpoints.list_devices` does, and makes no objects of rows: JSON columns pass as the texts that they are.
What it does not know (other orders, queries, times) is left to that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from typing import Any, NamedTuple

import msgspec

from agent.protocol.messages import ServingReport
from fleet_server.db import Database
from fleet_server.devices import service
from fleet_server.devices.schemas import HoldView
from fleet_server.loop_reads import LoopReads
from fleet_server.paging import encode_cursor
from fleet_server.schemas import Response

Row = tuple[Any, ...]
_QUIET = '"problems":[],"waiting":[],"hold":null'
_NULL, _TRUE, _FALSE, _EMPTY, _WHOLE = "null", "true", "false", "[]", ".000000"
_NO_TAGS = '"tags": {}'  # as the driver's texts have it
_ITEM_BEGINS, _FACTS_BEGIN, _FACTS_END = '{"id":"', ',"facts":', ',"serving":'
_MARK, _NEXT_ITEM, _NEXT_VALUE = "\x1f", "\x1e", "\x1d"  # JSON has no such characters, nor have ids and names
_WAITS = re.compile(r'"waiting":\s*\{')


class _Shape(NamedTuple):
    """What statements differ by; the rest of what is wanted is their parameters."""

    turned: bool
    after: bool
    profile: bool
    online: bool | None


@dataclass(frozen=True)
class Wanted:
    """Which page.

    Attributes:
        limit: most devices of it.
        turned: by id from the last to the first.
        after: the last device before it.
        profile: only devices of this profile.
        online: only those that are, or are not, connected.
    """

    limit: int
    turned: bool = False
    after: str | None = None
    profile: str | None = None
    online: bool | None = None

    @property
    def shape(self) -> _Shape:
        """What its statement depends on."""
        return _Shape(self.turned, self.after is not None, self.profile is not None, self.online)


@dataclass(frozen=True)
class Page:
    """A page as JSON.

    Attributes:
        body: UTF-8.
        cursor: of the page after it; None after the last.
    """

    body: bytes
    cursor: str | None


class _Facts(msgspec.Struct):
    tags: dict[str, str] = {}


_encode = msgspec.json.Encoder().encode
_read_tags = msgspec.json.Decoder(dict[str, str]).decode
_read_facts = msgspec.json.Decoder(_Facts).decode
_read_serving = msgspec.json.Decoder(list[ServingReport]).decode


def read_page(database: Database, fleet_id: str, wanted: Wanted) -> Page:
    """A page from SQLite, by this thread's connection.

    Raises:
        Exception: whatever the driver raises.
    """
    with database.driver() as connection:
        rows: list[Row] = connection.execute(_sqlite(wanted.shape), _given(fleet_id, wanted)).fetchall()
    shown = rows[: wanted.limit]
    cursor = _cursor(wanted, shown[-1][0]) if len(rows) > len(shown) else None
    return _whole(",".join(_items(shown)), cursor)


async def await_page(reads: LoopReads, fleet_id: str, wanted: Wanted) -> Page:
    """A page from PostgreSQL. It writes the items itself: values of the driver cost more to make than to read.

    Raises:
        psycopg.Error: whatever is wrong with the database.
    """
    text = await reads.text(_postgresql(wanted.shape), [str(one) for one in _given(fleet_id, wanted)]) or ""
    cursor = None
    if text.count(_NEXT_ITEM) == wanted.limit:
        text = text[: text.rindex(_NEXT_ITEM)]
        last = text.rfind(_NEXT_ITEM) + 1 + len(_ITEM_BEGINS)
        cursor = _cursor(wanted, text[last : text.index('"', last)])
    return _whole(_finished(text), cursor)


def _given(fleet_id: str, wanted: Wanted) -> list[str | int]:
    """The parameters of both statements: one row more than the page has, to know whether it is the last."""
    return [fleet_id, *(one for one in (wanted.profile, wanted.after) if one is not None), wanted.limit + 1]


def _cursor(wanted: Wanted, last: str) -> str:
    return encode_cursor("-id" if wanted.turned else "id", last, last)


def _whole(items: str, cursor: str | None) -> Page:
    following = _NULL if cursor is None else _quoted(cursor)
    return Page(f'{{"items":[{items}],"next_cursor":{following}}}'.encode(), cursor)


def _from(shape: _Shape) -> str:
    parts = [
        "FROM devices d LEFT JOIN profiles p ON p.id = d.profile_id",
        "WHERE d.fleet_id = ? AND d.forgotten_at IS NULL",
        "AND p.name = ?" if shape.profile else "",
        "" if shape.online is None else f"AND d.online IS {str(shape.online).upper()}",
        f"AND d.id {'<' if shape.turned else '>'} ?" if shape.after else "",
        f"ORDER BY d.id {'DESC' if shape.turned else 'ASC'} LIMIT ?",
    ]
    return " ".join(parts)


@cache
def _sqlite(shape: _Shape) -> str:
    columns = (
        "d.id, p.name, d.profile_pinned, d.online, d.last_seen_at, d.created_at, d.tags, d.facts, d.serving, "
        "d.problems, d.reported_deployments, d.hold, d.desired_revision, d.reported_revision"
    )
    return f"SELECT {columns} {_from(shape)}"


@cache
def _postgresql(shape: _Shape) -> str:
    """All items in one text, with marks around what `_finished` looks at."""
    quiet = "d.problems::text = '[]' AND d.reported_deployments::text = '[]' AND d.hold IS NULL"
    loud = f"concat_ws('{_NEXT_VALUE}', d.problems::text, d.reported_deployments::text, coalesce(d.hold::text, ''))"
    item = {
        "profile": "coalesce(to_json(p.name)::text, 'null')",
        "profile_pinned": "to_json(d.profile_pinned)",
        "online": "to_json(d.online)",
        "last_seen_at": f"coalesce({_json_time('last_seen_at')}, 'null')",
        "tags": f"'{_MARK}' || d.tags::text || '{_MARK}'",
        "facts": "d.facts::text",
        "serving": f"'{_MARK}' || d.serving::text || '{_MARK}'",
        None: f"'{_MARK}' || CASE WHEN {quiet} THEN '' ELSE {loud} END || '{_MARK}'",
        "desired_revision": "d.desired_revision",
        "reported_revision": "d.reported_revision",
        "created_at": _json_time("created_at"),
    }
    fields = ",".join("%s" if name is None else f'"{name}":%s' for name in item)
    parts = [
        f"SELECT string_agg(item, '{_NEXT_ITEM}' ORDER BY id {'DESC' if shape.turned else 'ASC'}) FROM",
        f"(SELECT d.id, format('{_ITEM_BEGINS}%s\",{fields}}}', d.id, {', '.join(item.values())}) AS item",
        _from(shape),
        ") AS page",
    ]
    numbers = count(1)
    return re.sub(r"\?", lambda _: f"${next(numbers)}", " ".join(parts))


def _json_time(name: str) -> str:
    """As `_time` has it."""
    text = f"to_char(d.{name} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')"
    return f"""'"' || replace({text}, '{_WHOLE}', '') || 'Z"'"""


def _finished(text: str) -> str:
    """Items as PostgreSQL wrote them, with what only is known here."""
    parts = text.split(_MARK)
    for at in range(1, len(parts), 6):
        tags, facts, serving, _, loud = parts[at : at + 5]
        if _NO_TAGS not in facts:
            parts[at] = _tags(facts[len(_FACTS_BEGIN) : -len(_FACTS_END)], tags)
        if serving != _EMPTY:
            parts[at + 2] = _serving(serving)
        parts[at + 4] = _loud(*loud.split(_NEXT_VALUE)) if loud else _QUIET
    return "".join(parts).replace(_NEXT_ITEM, ",")


def _items(rows: Sequence[Row]) -> list[str]:
    """One loop, and no calls that can be spared. An id has no character that JSON would write otherwise."""
    return [
        f'{_ITEM_BEGINS}{device_id}","profile":{_NULL if profile is None else _name(profile)},'
        f'"profile_pinned":{_TRUE if pinned else _FALSE},"online":{_TRUE if online else _FALSE},'
        f'"last_seen_at":{_NULL if seen is None else _time(seen)},'
        f'"tags":{tags if _NO_TAGS in facts else _tags(facts, tags)},"facts":{facts},'
        f'"serving":{_EMPTY if serving == _EMPTY else _serving(serving)},'
        f"{_QUIET if problems == deployments == _EMPTY and not hold else _loud(problems, deployments, hold)},"
        f'"desired_revision":{desired},"reported_revision":{reported},"created_at":{_time(created)}}}'
        for (
            device_id, profile, pinned, online, seen, created, tags, facts, serving, problems, deployments, hold,
            desired, reported,
        ) in rows
    ]  # fmt: skip


def _quoted(value: str) -> str:
    return _encode(value).decode()


_name = lru_cache(maxsize=1024)(_quoted)  # of profiles: there are few


def _time(text: str) -> str:
    """From `2026-01-31 12:00:00.000000` to what pydantic makes of that time."""
    return f'"{text[:10]}T{text[11:19]}Z"' if text[19:] == _WHOLE else f'"{text[:10]}T{text[11:]}Z"'


def _tags(facts: str, tags: str) -> str:
    """A device's tags, those that its facts say before those that it was given.

    A device that says `"tags": {}` elsewhere in its facts hides its own from this list; nobody else's.
    """
    own = _read_facts(facts).tags
    return _encode(own | _read_tags(tags)).decode() if own else tags


@lru_cache(maxsize=4096)  # many devices serve the same
def _serving(text: str) -> str:
    return _encode(_read_serving(text)).decode()


def _loud(problems: str, deployments: str, hold: str | None) -> str:
    """What is wrong with a device, what it waits for, and whether it is held."""
    return (
        f'"problems":{_EMPTY if problems == _EMPTY else _problems(problems)},"waiting":{_waiting(deployments)},'
        f'"hold":{_hold(hold) if hold else _NULL}'
    )


def _problems(text: str) -> str:
    return _shown(service.problem_view(one) for one in msgspec.json.decode(text))


def _waiting(deployments: str) -> str:
    if not _WAITS.search(deployments):
        return _EMPTY
    return _shown(service.waiting_views(msgspec.json.decode(deployments)))


def _shown(views: Iterable[Response]) -> str:
    return f"[{','.join(one.model_dump_json() for one in views)}]"


def _hold(text: str) -> str:
    return HoldView.model_validate_json(text).model_dump_json()
