"""What was done, by whom: a hash chain a fleet, written in the transaction of what it records.

Each event holds the hash of the one before it; its own is SHA-256 over that hash and the canonical JSON of the event
(keys sorted, no spaces, UTF-8). Who changes, removes or inserts a row breaks every hash after it.

Events are chained when their transaction commits: the lock of the chain's head is so the last one that is taken and is
held for a moment only, and two writers can't wait for each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import event, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from fleet_server.clock import utc_now
from fleet_server.db import new_id
from fleet_server.models import AuditEvent, AuditHead
from fleet_server.principals import Actor, Who

FIRST = "0" * 64  # what the first event of a chain has for the hash before it
SMALL = 8192  # bytes of JSON that an event keeps whole
_WAITING = "shoal_audit"


def record(
    session: Session,
    *,
    fleet_id: str,
    actor: Who,
    action: str,
    subject: str,
    detail: Mapping[str, Any] | None = None,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> None:
    """Add an event to the present transaction.

    Args:
        session: a writing session; the caller commits.
        fleet_id: where it happened.
        actor: who did it: a principal by a request, `server`, or a device's id.
        action: what was done, such as `rollout.create`.
        subject: to what, such as `rollout/0190…`.
        detail: small JSON with what else matters.
        before: small JSON: what changed, as it was.
        after: the same as it is now.
    """
    waiting: list[AuditEvent] = session.info.setdefault(_WAITING, [])
    waiting.append(
        AuditEvent(
            id=new_id(),
            fleet_id=fleet_id,
            at=utc_now(),
            actor=str(actor),
            address=actor.address if isinstance(actor, Actor) else "",
            request_id=actor.request_id if isinstance(actor, Actor) else "",
            action=action,
            subject=subject,
            detail=_small(detail or {}),
            before=None if before is None else _small(before),
            after=None if after is None else _small(after),
        )
    )


def _small(value: Mapping[str, Any]) -> dict[str, Any]:
    """As the database will give it back; of what is too large, only what proves that it was this."""
    text = json.dumps(value, default=str, allow_nan=False)
    if len(text) > SMALL:
        return {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    small: dict[str, Any] = json.loads(text)
    return small


@event.listens_for(Session, "before_commit")
def _chain(session: Session) -> None:
    waiting: list[AuditEvent] = session.info.pop(_WAITING, [])
    for fleet_id in sorted({one.fleet_id for one in waiting}):
        head = _locked_head(session, fleet_id)
        for one in waiting:
            if one.fleet_id == fleet_id:
                one.sequence, one.previous_hash = head.sequence + 1, head.hash
                one.hash = hash_of(one)
                head.sequence, head.hash = one.sequence, one.hash
                session.add(one)


def _locked_head(session: Session, fleet_id: str) -> AuditHead:
    query = select(AuditHead).where(AuditHead.fleet_id == fleet_id).with_for_update()
    query = query.execution_options(populate_existing=True)
    head = session.scalar(query)
    if head is not None:
        return head
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    new = {"fleet_id": fleet_id, "sequence": 0, "hash": FIRST}
    session.execute(insert(AuditHead).values(new).on_conflict_do_nothing())
    return session.scalars(query).one()


def hash_of(one: AuditEvent) -> str:
    """The hash that an event must have."""
    content = {
        "action": one.action,
        "actor": one.actor,
        "address": one.address,
        "after": one.after,
        "at": one.at.isoformat(),
        "before": one.before,
        "detail": one.detail,
        "fleet": one.fleet_id,
        "id": one.id,
        "request_id": one.request_id,
        "sequence": one.sequence,
        "subject": one.subject,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(one.previous_hash.encode() + text.encode()).hexdigest()


@dataclass(frozen=True)
class Break:
    """Where a chain breaks first, and how."""

    sequence: int
    reason: str


@dataclass(frozen=True)
class Verification:
    """What a walk over a chain found.

    Who can write the head too may cut events off the end: keep `hash` elsewhere, and see that the chain still has it.

    Attributes:
        events: how many there are.
        hash: of the newest.
        broken: the first break; None for a whole chain.
    """

    events: int
    hash: str
    broken: Break | None


def verify(events: Iterable[AuditEvent], head: AuditHead | None) -> Verification:
    """Walk a fleet's chain.

    Args:
        events: all of them, by sequence.
        head: what the database says is the newest.
    """
    count, previous, broken = 0, FIRST, None
    for count, one in enumerate(events, 1):
        if broken is None:
            broken = _break_of(one, count, previous)
        previous = one.hash
    expected = (head.sequence, head.hash) if head is not None else (0, FIRST)
    if broken is None and (count, previous) != expected:
        broken = Break(count + 1, f"the chain ends at {count}, and its head says {expected[0]}: events were cut off")
    return Verification(count, previous, broken)


def _break_of(one: AuditEvent, sequence: int, previous: str) -> Break | None:
    if one.sequence != sequence:
        return Break(sequence, f"event {sequence} is missing: the next one is {one.sequence}")
    if one.previous_hash != previous:
        return Break(sequence, f"event {sequence} does not follow the one before it")
    if one.hash != hash_of(one):
        return Break(sequence, f"event {sequence} was changed: its hash is another")
    return None
