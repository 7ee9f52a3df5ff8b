"""The outbox: messages written in the transaction of the change that caused them, deleted when the broker has them.

A newer message of a retained topic makes the older ones pointless, so they go when it is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from agent.protocol.topics import SHARDS, shard_of_topic
from fleet_server.db import new_id, pieces, question
from fleet_server.models import OutboxMessage

HAS_MESSAGES = question(select(OutboxMessage.id))


@dataclass(frozen=True)
class PendingMessage:
    """A message that the broker has not acknowledged."""

    id: str
    topic: str
    payload: bytes
    retain: bool


def enqueue(session: Session, *, fleet_id: str, topic: str, payload: bytes, retain: bool) -> None:
    """Add a message to the present transaction; a retained one replaces those waiting for its topic."""
    if retain:
        enqueue_retained(session, fleet_id=fleet_id, payloads={topic: payload})
    else:
        shard = shard_of_topic(topic)
        session.add(OutboxMessage(fleet_id=fleet_id, topic=topic, payload=payload, retain=False, shard=shard))


def enqueue_retained(session: Session, *, fleet_id: str, payloads: Mapping[str, bytes]) -> None:
    """Add retained messages by their topics; they replace those waiting for these."""
    session.flush()
    for piece in pieces(list(payloads)):
        older = OutboxMessage.topic.in_(piece), OutboxMessage.retain.is_(True)
        session.execute(delete(OutboxMessage).where(*older).execution_options(synchronize_session=False))
    rows = [
        {
            "id": new_id(),
            "fleet_id": fleet_id,
            "topic": topic,
            "payload": payload,
            "retain": True,
            "shard": shard_of_topic(topic),
        }
        for topic, payload in payloads.items()
    ]
    if rows:
        session.execute(insert(OutboxMessage), rows)


def pending(session: Session, *, limit: int, shards: Collection[int] | None = None) -> list[PendingMessage]:
    """The oldest messages, in the order they were written.

    Args:
        session: to read with.
        limit: how many at most.
        shards: those of whose devices it is asked for; None for all.
    """
    query = select(OutboxMessage).order_by(OutboxMessage.id).limit(limit)
    if shards is not None and len(shards) < SHARDS:
        query = query.where(OutboxMessage.shard.in_(sorted(shards)))
    rows = session.scalars(query)
    return [PendingMessage(row.id, row.topic, row.payload, row.retain) for row in rows]


def acknowledge(session: Session, ids: Iterable[str]) -> None:
    """Forget messages that the broker has."""
    session.execute(delete(OutboxMessage).where(OutboxMessage.id.in_(list(ids))))
