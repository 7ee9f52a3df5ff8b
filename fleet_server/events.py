"""Events as CloudEvents 1.0, for whoever subscribed: written in the transaction of the change that they tell of.

What is written here is sent by `fleet_server.webhooks.keeper`, so nothing is lost when a server dies. A subject that
has something to tell calls `emit` with a type of its own, such as `shoal.rollout.paused`; nothing else knows of types.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.clock import utc_now
from fleet_server.db import new_id
from fleet_server.models import Webhook, WebhookDelivery

_KNOWN = "shoal_webhooks"


def emit(
    session: Session,
    *,
    fleet_id: str,
    kind: str,
    subject: str,
    data: Callable[[], Mapping[str, Any]],
) -> None:
    """Add an event to the present transaction, where somebody wants to know.

    Args:
        session: a writing session; the caller commits.
        fleet_id: where it happened.
        kind: the event's type: what happened, such as `shoal.rollout.paused`.
        subject: to what, such as `rollout/0190…`; events of one subject are sent in order.
        data: makes the event's data, as JSON; not called when nobody listens.
    """
    with session.no_autoflush:  # the change that is told of may not be whole yet
        listening = [webhook for webhook in _active(session, fleet_id) if wants(webhook.types, kind)]
        if listening:
            event_id, body = cloud_event(fleet_id, kind, subject, data())
            session.add_all(deliver(webhook, event_id, kind, subject, body) for webhook in listening)


def wants(patterns: Iterable[str], kind: str) -> bool:
    """Whether one of some patterns is of a type; a `*` stands for any characters."""
    return any(re.fullmatch(re.escape(one).replace(r"\*", ".*"), kind) for one in patterns)


def cloud_event(fleet_id: str, kind: str, subject: str, data: Mapping[str, Any]) -> tuple[str, str]:
    """A new event's id, and the event in the structured JSON mode (CloudEvents JSON format 1.0.2)."""
    event_id = new_id()
    event = {
        "specversion": "1.0",
        "id": event_id,
        "source": f"/api/v1/fleets/{fleet_id}",
        "type": kind,
        "subject": subject,
        "time": utc_now().isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "data": data,
    }
    return event_id, json.dumps(event, separators=(",", ":"), default=str, allow_nan=False)


def deliver(webhook: Webhook, event_id: str, kind: str, subject: str, body: str) -> WebhookDelivery:
    """The row that says that a webhook is to be told of an event."""
    return WebhookDelivery(
        id=new_id(),  # made now: they are sent in this order
        fleet_id=webhook.fleet_id,
        webhook_id=webhook.id,
        event_id=event_id,
        type=kind,
        subject=subject,
        body=body,
    )


def _active(session: Session, fleet_id: str) -> list[Webhook]:
    """Read once a transaction: a report may move many deployments."""
    known: dict[str, list[Webhook]] = session.info.setdefault(_KNOWN, {})
    if fleet_id not in known:
        query = select(Webhook).where(Webhook.fleet_id == fleet_id, Webhook.active.is_(True)).order_by(Webhook.id)
        known[fleet_id] = list(session.scalars(query))
    return known[fleet_id]
