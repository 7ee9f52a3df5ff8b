"""A page of the list of devices, from the driver's rows to JSON: what pages and programs ask for more than all else.

It answers as `endpoints.list_devices` does, and makes no objects of rows: JSON columns pass as the texts that they are.
What it does not know (other orders, queries, times) is left to that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import msgspec

from agent.protocol.messages import ServingReport
from fleet_server.db import Database
from fleet_server.devices import service
from fleet_server.devices.schemas import HoldView
from fleet_server.paging import encode_cursor
from fleet_server.schemas import Response

Row = tuple[Any, ...]
_TEXTS = ("tags", "facts", "serving", "problems", "reported_deployments", "hold")
_QUIET = '"problems":[],"waiting":[],"hold":null,'
_NULL, _TRUE, _FALSE, _EMPTY, _WHOLE = "null", "true", "false", "[]", ".000000"
_NO_TAGS = '"tags": {}'  # as the driver's texts have it
_WAITS = re.compile(r'"waiting":\s*\{')


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


class _Facts(msgspec.Struct):
    tags: dict[str, str] = {}


_encode = msgspec.json.Encoder().encode
_read_tags = msgspec.json.Decoder(dict[str, str]).decode
_read_facts = msgspec.json.Decoder(_Facts).decode
_read_serving = msgspec.json.Decoder(list[ServingReport]).decode


def devices_json(database: Database, fleet_id: str, wanted: Wanted) -> tuple[bytes, str | None]:
    """A page as JSON, and the cursor of the one after it.

    Args:
        database: to read.
        fleet_id: of the devices.
        wanted: which page.

    Raises:
        Exception: whatever the driver raises.
    """
    given = [fleet_id, *(one for one in (wanted.profile, wanted.after) if one is not None), wanted.limit + 1]
    with database.driver() as connection:
        rows = connection.execute(statement(database, wanted), given).fetchall()
    shown = rows[: wanted.limit]
    cursor = (
        encode_cursor("-id" if wanted.turned else "id", shown[-1][0], shown[-1][0]) if len(rows) > len(shown) else None
    )
    return _page(shown, cursor), cursor


def statement(database: Database, wanted: Wanted) -> str:
    """The one statement of a page. Its parameters: fleet, profile and last device where given, rows at most."""
    return _statement(
        database.is_sqlite, wanted.turned, wanted.after is not None, wanted.profile is not None, wanted.online
    )


@cache
def _statement(is_sqlite: bool, turned: bool, after: bool, profile: bool, online: bool | None) -> str:  # noqa: FBT001
    texts = (f"d.{name}" if is_sqlite else f"d.{name}::text AS {name}" for name in _TEXTS)
    times = (
        f"d.{name}" if is_sqlite else f"to_char(d.{name} AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')"
        for name in ("last_seen_at", "created_at")
    )
    parts = [
        "SELECT d.id, p.name, d.profile_pinned, d.online,",
        ", ".join((*times, *texts)),
        ", d.desired_revision, d.reported_revision",
        "FROM devices d LEFT JOIN profiles p ON p.id = d.profile_id",
        "WHERE d.fleet_id = ? AND d.forgotten_at IS NULL",
        "AND p.name = ?" if profile else "",
        "" if online is None else f"AND d.online IS {str(online).upper()}",
        f"AND d.id {'<' if turned else '>'} ?" if after else "",
        f"ORDER BY d.id {'DESC' if turned else 'ASC'} LIMIT ?",
    ]
    text = " ".join(parts)
    return text if is_sqlite else text.replace("?", "%s")


def _page(rows: Sequence[Row], cursor: str | None) -> bytes:
    """One loop, and no calls that can be spared. An id has no character that JSON would write otherwise."""
    items = []
    for (
        device_id, profile, pinned, online, seen, created, tags, facts, serving, problems, deployments, hold, desired,
        reported,
    ) in rows:  # fmt: skip
        items.append(
            f'{{"id":"{device_id}","profile":{_NULL if profile is None else _name(profile)},'
            f'"profile_pinned":{_TRUE if pinned else _FALSE},"online":{_TRUE if online else _FALSE},'
            f'"last_seen_at":{_NULL if seen is None else _time(seen)},'
            f'"tags":{tags if _NO_TAGS in facts else _tags(facts, tags)},"facts":{facts},'
            f'"serving":{_EMPTY if serving == _EMPTY else _serving(serving)},'
            f"{_QUIET if problems == deployments == _EMPTY and hold is None else _loud(problems, deployments, hold)}"
            f'"desired_revision":{desired},"reported_revision":{reported},"created_at":{_time(created)}}}'
        )
    following = _NULL if cursor is None else _quoted(cursor)
    return f'{{"items":[{",".join(items)}],"next_cursor":{following}}}'.encode()


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
        f'"hold":{_NULL if hold is None else _hold(hold)},'
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
