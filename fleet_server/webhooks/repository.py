"""Every query over webhooks and deliveries."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Sequence

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session, aliased

from fleet_server.db import question
from fleet_server.models import Webhook, WebhookDelivery
from fleet_server.paging import PageRequest, Rows, TableList, matches
from fleet_server.webhooks.schedule import DeliveryState

PENDING = DeliveryState.PENDING.value
HAS_PENDING = question(select(WebhookDelivery.id).where(WebhookDelivery.state == PENDING))
WEBHOOKS = TableList(
    Webhook.id, {"created_at": Webhook.id, "url": Webhook.url}, default="created_at", time=Webhook.created_at
)
DELIVERIES = TableList(
    WebhookDelivery.id,
    {"created_at": WebhookDelivery.id, "next_at": WebhookDelivery.next_at, "type": WebhookDelivery.type},
    default="-created_at",
    time=WebhookDelivery.created_at,
)


def webhook(session: Session, fleet_id: str, webhook_id: str) -> Webhook | None:
    """One webhook of a fleet."""
    found = session.get(Webhook, webhook_id)
    return found if found is not None and found.fleet_id == fleet_id else None


def webhooks_page(session: Session, fleet_id: str, request: PageRequest, *, active: bool | None) -> Rows[Webhook]:
    """A page of webhooks."""
    query = select(Webhook).where(Webhook.fleet_id == fleet_id)
    return WEBHOOKS.scalars(session, query if active is None else query.where(Webhook.active.is_(active)), request)


def count(session: Session, fleet_id: str) -> int:
    """How many webhooks a fleet has."""
    return session.scalar(select(func.count()).select_from(Webhook).where(Webhook.fleet_id == fleet_id)) or 0


def remove(session: Session, found: Webhook) -> None:
    """Remove a webhook with all that it was told, or was to be told."""
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.webhook_id == found.id))
    session.delete(found)
    session.flush()


def delivery(session: Session, fleet_id: str, delivery_id: str) -> WebhookDelivery | None:
    """One delivery of a fleet."""
    found = session.get(WebhookDelivery, delivery_id)
    return found if found is not None and found.fleet_id == fleet_id else None


def deliveries_page(
    session: Session,
    fleet_id: str,
    request: PageRequest,
    *,
    webhook_id: str | None,
    state: str | None,
    type: str | None,  # noqa: A002
    subject: str | None,
) -> Rows[WebhookDelivery]:
    """A page of deliveries."""
    query = select(WebhookDelivery).where(WebhookDelivery.fleet_id == fleet_id)
    narrowed = ((WebhookDelivery.webhook_id, webhook_id), (WebhookDelivery.state, state))
    for column, value in narrowed:
        if value is not None:
            query = query.where(column == value)
    for pattern_of, text in ((WebhookDelivery.type, type), (WebhookDelivery.subject, subject)):
        if text is not None:
            query = query.where(matches(pattern_of, text))
    return DELIVERIES.scalars(session, query, request)


def with_due(session: Session, now: dt.datetime) -> Sequence[str]:
    """Ids of active webhooks that something is due for."""
    query = (
        select(WebhookDelivery.webhook_id)
        .join(Webhook, Webhook.id == WebhookDelivery.webhook_id)
        .where(WebhookDelivery.state == PENDING, WebhookDelivery.next_at <= now, Webhook.active.is_(True))
        .distinct()
    )
    return session.scalars(query).all()


def due(
    session: Session, webhook_id: str, now: dt.datetime, *, besides: Collection[str], limit: int
) -> Sequence[WebhookDelivery]:
    """What is to be sent to a webhook now: of each subject the first that it was not told of yet."""
    earlier = aliased(WebhookDelivery)
    blocked = (
        select(earlier.id)
        .where(
            earlier.webhook_id == webhook_id,
            earlier.subject == WebhookDelivery.subject,
            earlier.state == PENDING,
            earlier.id < WebhookDelivery.id,
        )
        .exists()
    )
    query = select(WebhookDelivery).where(
        WebhookDelivery.webhook_id == webhook_id,
        WebhookDelivery.state == PENDING,
        WebhookDelivery.next_at <= now,
        WebhookDelivery.subject.not_in(besides),
        ~blocked,
    )
    return session.scalars(query.order_by(WebhookDelivery.id).limit(limit)).all()


def bury(session: Session, webhook_id: str, now: dt.datetime, detail: str) -> None:
    """Give up all that a webhook is still to be told."""
    waiting = (WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.state == PENDING)
    dead = {"state": DeliveryState.DEAD.value, "finished_at": now, "last_detail": detail}
    session.execute(update(WebhookDelivery).where(*waiting).values(**dead))


def forget(session: Session, state: DeliveryState, before: dt.datetime) -> None:
    """Remove what ended in a state before a time."""
    ended = (WebhookDelivery.state == state.value, WebhookDelivery.finished_at < before)
    session.execute(delete(WebhookDelivery).where(*ended))
