"""Conditional requests (RFC 9110, section 13): `ETag` and `If-None-Match` of what is read, `If-Match` of what changes.

An ETag has two parts, of which each is a hash: `"<whole>.<set>"`. The first is over the whole answer, and decides about
304. The second leaves out what the server or a device merely observes (`Response.observed`: when a device was last
seen, how far a rollout has come), and decides about 412: or nobody could change a device that reports all the time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated

import msgspec
import xxhash
from fastapi import Depends, Header
from pydantic import BaseModel
from sqlalchemy.orm import Session

from fleet_server.db import Base
from fleet_server.errors import InvalidError, PreconditionFailedError

_LIST = re.compile(r'\s*(?:W/)?"[\x21\x23-\x7e]*"(?:\s*,\s*(?:W/)?"[\x21\x23-\x7e]*")*\s*')
_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e]*)"')
EXAMPLE = '"6f1ed002ab5595859014ebf0951522d9.9a0364b9e99bb480dd25e1f0284c8555"'


def entity_tag(body: bytes, observed: Collection[str] | None = ()) -> str:
    """The strong ETag of a JSON answer.

    Args:
        body: the answer.
        observed: its fields that do not count for `If-Match`; None for what is not changed as a whole, such as a list.
    """
    if observed is None:
        whole = _hash(body)
        return f'"{whole}.{whole}"'
    found = msgspec.json.decode(body)
    whole = _hash(msgspec.json.encode(found, order="sorted"))
    if not isinstance(found, dict) or not observed:
        return f'"{whole}.{whole}"'
    kept = {key: value for key, value in found.items() if key not in observed}
    return f'"{whole}.{_hash(msgspec.json.encode(kept, order="sorted"))}"'


def _hash(data: bytes) -> str:
    """XXH3 (github.com/Cyan4973/xxHash): a page is hashed with each answer, and nobody gains by two that look alike."""
    return str(xxhash.xxh3_128_hexdigest(data))


def none_match(header: str | None, tag: str) -> bool:
    """Whether a client has what a tag stands for already: `If-None-Match` names it, whole, or is `*`."""
    if header is None:
        return False
    return header.strip() == "*" or tag.strip('"') in {found for _, found in _TAG.findall(header)}


@dataclass(frozen=True)
class Precondition:
    """What a change is asked for on condition of: the second parts of ETags; None for no condition, `*` for any."""

    tags: frozenset[str] | None

    def check(self, session: Session, row: Base, view: Callable[[], BaseModel]) -> None:
        """Let a change go on where the thing is as the client saw it; it then stays so until the transaction ends.

        Args:
            session: a writing session that has changed nothing yet.
            row: of the thing: it is locked, so that of two clients that saw the same, one is refused.
            view: makes the answer to a GET of the thing.

        Raises:
            PreconditionFailedError: where it has changed.
        """
        if self.tags is None:
            return
        # Not FOR UPDATE: rows that refer to this one lock its key, and need not wait.
        session.refresh(row, with_for_update={"key_share": True})
        session.expire_all()
        found = view()
        if (
            "*" not in self.tags
            and part(entity_tag(found.model_dump_json().encode(), observed_of(type(found)))) not in self.tags
        ):
            raise PreconditionFailedError(
                "changed_since", "If-Match: it has been changed since you read it: read it again, then decide again"
            )


def part(tag: str) -> str:
    """The part of a tag that decides about changes."""
    return tag.strip('"').rpartition(".")[2]


def observed_of(model: object) -> Collection[str] | None:
    """The fields of an answer's model that do not count for `If-Match`; None where nothing of it ever does."""
    found: Collection[str] | None = getattr(model, "observed", ())
    return found


async def _precondition(
    if_match: Annotated[
        str | None,
        Header(
            description="Change it only where it still is what this ETag of a GET stands for (RFC 9110); else 412.",
            examples=[EXAMPLE],
        ),
    ] = None,
) -> Precondition:
    if if_match is None:
        return Precondition(None)
    if if_match.strip() == "*":
        return Precondition(frozenset({"*"}))
    if not _LIST.fullmatch(if_match):
        detail = f"If-Match: it is no ETag such as {EXAMPLE}: send the header ETag of a GET as it is, with its quotes"
        raise InvalidError("bad_etag", detail, field="If-Match")
    return Precondition(frozenset(part(tag) for weak, tag in _TAG.findall(if_match) if not weak))


IfMatch = Annotated[Precondition, Depends(_precondition)]
