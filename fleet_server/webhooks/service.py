"""Rules of webhooks. Each function works in its caller's transaction."""

from __future__ import annotations

import datetime as dt
import json

from sqlalchemy.orm import Session

from fleet_server import audit, events
from fleet_server.clock import utc_now
from fleet_server.errors import ConflictError, InvalidError, NotFoundError
from fleet_server.models import Webhook, WebhookDelivery
from fleet_server.principals import Who
from fleet_server.settings import Settings
from fleet_server.webhooks import repository, signing
from fleet_server.webhooks.schedule import GONE, DeliveryState, Outcome, next_try
from fleet_server.webhooks.schemas import DeliveryDetail, DeliveryView, WebhookCreate, WebhookSecret, WebhookUpdate
from fleet_server.webhooks.sending import RefusedAddressError, check_url

MOST = 100  # webhooks of a fleet
TEST_TYPE = "shoal.webhook.test"


def create(session: Session, settings: Settings, fleet_id: str, wanted: WebhookCreate, *, actor: Who) -> WebhookSecret:
    """Add a webhook; its secret is in the answer and in no later one.

    Raises:
        InvalidError: for a URL that may not be sent to, and where the fleet has too many.
    """
    _check_url(settings, wanted.url)
    if repository.count(session, fleet_id) >= MOST:
        raise InvalidError("too_many_webhooks", f"the fleet has {MOST} webhooks: delete one first")
    webhook = Webhook(
        fleet_id=fleet_id,
        url=wanted.url,
        types=list(wanted.types),
        description=wanted.description,
        active=wanted.active,
        secret=wanted.secret or signing.new_secret(),
        created_by=str(actor),
    )
    session.add(webhook)
    session.flush()
    _record(session, webhook, actor, "create", after=_shown(webhook))
    return _with_secret(webhook)


def get(session: Session, fleet_id: str, webhook_id: str) -> Webhook:
    """One webhook.

    Raises:
        NotFoundError: when the fleet has none of that id.
    """
    webhook = repository.webhook(session, fleet_id, webhook_id)
    if webhook is None:
        raise NotFoundError("webhook", webhook_id, remedy="list them with `shoal webhook list`")
    return webhook


def change(session: Session, settings: Settings, webhook: Webhook, wanted: WebhookUpdate, *, actor: Who) -> Webhook:
    """Change a webhook; what waited while it was not active is sent from now on.

    Raises:
        InvalidError: for a URL that may not be sent to.
    """
    before = _shown(webhook)
    if wanted.url is not None:
        _check_url(settings, wanted.url)
        webhook.url = wanted.url
    if wanted.types is not None:
        webhook.types = list(wanted.types)
    if wanted.description is not None:
        webhook.description = wanted.description
    if wanted.active is not None:
        webhook.active, webhook.stopped_because = wanted.active, ""
    session.flush()
    _record(session, webhook, actor, "update", before=before, after=_shown(webhook))
    return webhook


def rotate(session: Session, webhook: Webhook, overlap_hours: float, *, actor: Who) -> WebhookSecret:
    """Give a webhook a new secret; the one before signs too for a while."""
    webhook.old_secret, webhook.secret = webhook.secret, signing.new_secret()
    webhook.old_secret_until = utc_now() + dt.timedelta(hours=overlap_hours)
    session.flush()
    _record(session, webhook, actor, "rotate", after={"old_secret_until": webhook.old_secret_until})
    return _with_secret(webhook)


def remove(session: Session, webhook: Webhook, *, actor: Who) -> None:
    """Tell it nothing more, and forget what it was told."""
    _record(session, webhook, actor, "delete", before=_shown(webhook))
    repository.remove(session, webhook)


def send_test(session: Session, webhook: Webhook, *, actor: Who) -> WebhookDelivery:
    """Send it an event of the type `shoal.webhook.test`, whatever it subscribed to.

    Raises:
        ConflictError: when it is not active: nothing would be sent.
    """
    _check_active(webhook)
    subject = f"webhook/{webhook.id}"
    data = {"id": webhook.id, "asked_by": str(actor)}
    event_id, body = events.cloud_event(webhook.fleet_id, TEST_TYPE, subject, data)
    delivery = events.deliver(webhook, event_id, TEST_TYPE, subject, body)
    session.add(delivery)
    session.flush()
    _record(session, webhook, actor, "test")
    return delivery


def get_delivery(session: Session, fleet_id: str, delivery_id: str) -> WebhookDelivery:
    """One delivery.

    Raises:
        NotFoundError: when the fleet has none of that id.
    """
    delivery = repository.delivery(session, fleet_id, delivery_id)
    if delivery is None:
        raise NotFoundError("delivery", delivery_id, remedy="list them with `shoal webhook deliveries`")
    return delivery


def redeliver(session: Session, delivery: WebhookDelivery, *, actor: Who) -> WebhookDelivery:
    """Send again what was delivered, or given up, with the same id, and as many tries as at first.

    Raises:
        ConflictError: when it is still to be sent, or its webhook is not active.
    """
    webhook = session.get_one(Webhook, delivery.webhook_id)
    _check_active(webhook)
    if delivery.state == DeliveryState.PENDING.value:
        raise ConflictError(
            "not_dead", f"the delivery is pending, and sent by itself at {delivery.next_at:%H:%M:%S} UTC"
        )
    now = utc_now()
    delivery.state, delivery.attempts, delivery.finished_at = DeliveryState.PENDING.value, 0, None
    delivery.due_since, delivery.next_at = now, now
    session.flush()
    _record(session, webhook, actor, "redeliver", after={"delivery": delivery.id, "event": delivery.event_id})
    return delivery


def settle(
    session: Session, delivery_id: str, outcome: Outcome, now: dt.datetime, *, lifetime: dt.timedelta, chance: float
) -> None:
    """Note what became of a try: it was taken, is tried again later, or was the last."""
    delivery = session.get(WebhookDelivery, delivery_id, with_for_update=True)
    if delivery is None or delivery.state != DeliveryState.PENDING.value:
        return  # its webhook was deleted meanwhile, or another server sent it too
    delivery.attempts += 1
    delivery.last_status, delivery.last_detail = outcome.status, outcome.detail[:1000]
    if outcome.taken:
        delivery.state, delivery.finished_at = DeliveryState.DELIVERED.value, now
        return
    later = next_try(delivery.attempts, outcome, now, delivery.due_since + lifetime, chance)
    if later is not None:
        delivery.next_at = later
        return
    delivery.state, delivery.finished_at = DeliveryState.DEAD.value, now
    if outcome.status == GONE:
        webhook = session.get_one(Webhook, delivery.webhook_id)
        webhook.active, webhook.stopped_because = False, "the receiver said 410 Gone"
        repository.bury(session, webhook.id, now, webhook.stopped_because)
        _record(session, webhook, "server", "stop", after=_shown(webhook))


def secrets_of(webhook: Webhook, now: dt.datetime) -> list[str]:
    """The secrets that sign: the present one, and the one before as long as it may."""
    old = webhook.old_secret_until is not None and now < webhook.old_secret_until
    return [webhook.secret, *([webhook.old_secret] if old and webhook.old_secret else [])]


def delivery_detail(delivery: WebhookDelivery) -> DeliveryDetail:
    """A delivery with its event."""
    shown = DeliveryView.model_validate(delivery)
    return DeliveryDetail(**shown.model_dump(), event=json.loads(delivery.body))


def _with_secret(webhook: Webhook) -> WebhookSecret:
    return WebhookSecret.model_validate(webhook)


def _check_url(settings: Settings, url: str) -> None:
    try:
        check_url(url, allow_private=settings.webhook_allow_private)
    except (ValueError, RefusedAddressError) as error:
        raise InvalidError("bad_webhook_url", f"url: {error}", field="url") from None


def _check_active(webhook: Webhook) -> None:
    if not webhook.active:
        raise ConflictError("webhook_inactive", "the webhook is not active: `shoal webhook change --active` first")


def _shown(webhook: Webhook) -> dict[str, object]:
    return {"url": webhook.url, "types": list(webhook.types), "active": webhook.active}


def _record(
    session: Session,
    webhook: Webhook,
    actor: Who,
    action: str,
    *,
    before: dict[str, object] | None = None,
    after: dict[str, object] | None = None,
) -> None:
    audit.record(
        session,
        fleet_id=webhook.fleet_id,
        actor=actor,
        action=f"webhook.{action}",
        subject=f"webhook/{webhook.id}",
        before=before,
        after=after,
    )
