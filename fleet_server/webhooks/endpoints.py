"""HTTP of webhooks and deliveries."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, status

from fleet_server.http import Actor, AppSettings, FleetId, ReadSession, WriteSession
from fleet_server.openapi import problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page
from fleet_server.webhooks import repository, service
from fleet_server.webhooks.schedule import DeliveryState
from fleet_server.webhooks.schemas import (
    DeliveryDetail,
    DeliveryView,
    SecretRotation,
    WebhookCreate,
    WebhookSecret,
    WebhookUpdate,
    WebhookView,
)

router = APIRouter(tags=["webhooks"], route_class=ApiRoute)
WebhookId = Annotated[str, Path(description="The webhook's id.")]
DeliveryId = Annotated[str, Path(description="The delivery's id.")]
WebhookPaging = Annotated[PageRequest, Depends(paged(repository.WEBHOOKS))]
DeliveryPaging = Annotated[PageRequest, Depends(paged(repository.DELIVERIES))]


@router.post(
    "/webhooks",
    summary="Create a webhook",
    status_code=status.HTTP_201_CREATED,
    responses=problems("bad_webhook_url", "too_many_webhooks"),
)
def create_webhook(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, wanted: WebhookCreate
) -> WebhookSecret:
    """Events of the fleet are sent to it as CloudEvents, signed as Standard Webhooks has it, at least once."""
    return service.create(session, settings, fleet_id, wanted, actor=actor)


@router.get("/webhooks", summary="List webhooks")
def list_webhooks(
    session: ReadSession,
    fleet_id: FleetId,
    paging: WebhookPaging,
    active: Annotated[bool | None, Query(description="Only those that are, or are not, active.")] = None,
) -> Page[WebhookView]:
    """Webhooks of the fleet, without their secrets."""
    rows = repository.webhooks_page(session, fleet_id, paging, active=active)
    return page(rows, paging, WebhookView.model_validate)


@router.get("/webhooks/{webhook_id}", summary="Show a webhook", responses=problems("webhook_not_found"))
def show_webhook(session: ReadSession, fleet_id: FleetId, webhook_id: WebhookId) -> WebhookView:
    """One webhook, without its secret."""
    return WebhookView.model_validate(service.get(session, fleet_id, webhook_id))


@router.patch(
    "/webhooks/{webhook_id}", summary="Change a webhook", responses=problems("webhook_not_found", "bad_webhook_url")
)
def change_webhook(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    webhook_id: WebhookId,
    change: WebhookUpdate,
) -> WebhookView:
    """Fields that are absent stay as they are."""
    row = service.get(session, fleet_id, webhook_id)
    unchanged.check(session, row, lambda: WebhookView.model_validate(row))
    return WebhookView.model_validate(service.change(session, settings, row, change, actor=actor))


@router.delete(
    "/webhooks/{webhook_id}",
    summary="Delete a webhook",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("webhook_not_found"),
)
def delete_webhook(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, webhook_id: WebhookId
) -> None:
    """With all that it was told, or was to be told."""
    row = service.get(session, fleet_id, webhook_id)
    unchanged.check(session, row, lambda: WebhookView.model_validate(row))
    service.remove(session, row, actor=actor)


@router.post(
    "/webhooks/{webhook_id}/test",
    summary="Send a test event",
    status_code=status.HTTP_202_ACCEPTED,
    responses=problems("webhook_not_found", "webhook_inactive"),
)
def test_webhook(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, webhook_id: WebhookId
) -> DeliveryView:
    """An event of the type `shoal.webhook.test`; see at `/webhook-deliveries/{id}` what became of it."""
    row = service.get(session, fleet_id, webhook_id)
    unchanged.check(session, row, lambda: WebhookView.model_validate(row))
    return DeliveryView.model_validate(service.send_test(session, row, actor=actor))


@router.post(
    "/webhooks/{webhook_id}/rotate-secret",
    summary="Change a webhook's secret",
    responses=problems("webhook_not_found"),
)
def rotate_webhook_secret(
    session: WriteSession,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    webhook_id: WebhookId,
    how: SecretRotation,
) -> WebhookSecret:
    """Events are signed with the new secret, and for a while with the one before too."""
    row = service.get(session, fleet_id, webhook_id)
    unchanged.check(session, row, lambda: WebhookView.model_validate(row))
    return service.rotate(session, row, how.overlap_hours, actor=actor)


@router.get("/webhook-deliveries", summary="List deliveries to webhooks")
def list_deliveries(
    session: ReadSession,
    fleet_id: FleetId,
    paging: DeliveryPaging,
    webhook: Annotated[str | None, Query(description="Only to this webhook.")] = None,
    state: Annotated[DeliveryState | None, Query(description="Only these: `dead` lists the dead letters.")] = None,
    type: Annotated[str | None, Query(description="Only of this type, such as `shoal.rollout.*`.")] = None,  # noqa: A002
    subject: Annotated[str | None, Query(description="Only of this subject, such as `rollout/0190…`.")] = None,
) -> Page[DeliveryView]:
    """What was sent, is to be sent, or was given up, newest first; kept for 7 days, dead letters for 30."""
    rows = repository.deliveries_page(
        session, fleet_id, paging, webhook_id=webhook, state=state, type=type, subject=subject
    )
    return page(rows, paging, DeliveryView.model_validate)


@router.get("/webhook-deliveries/{delivery_id}", summary="Show a delivery", responses=problems("delivery_not_found"))
def show_delivery(session: ReadSession, fleet_id: FleetId, delivery_id: DeliveryId) -> DeliveryDetail:
    """One delivery with its event, and what the receiver said last."""
    return service.delivery_detail(service.get_delivery(session, fleet_id, delivery_id))


@router.post(
    "/webhook-deliveries/{delivery_id}/redeliver",
    summary="Send a delivery again",
    status_code=status.HTTP_202_ACCEPTED,
    responses=problems("delivery_not_found", "not_dead", "webhook_inactive"),
)
def redeliver(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, delivery_id: DeliveryId
) -> DeliveryView:
    """A dead letter, or one that was delivered, with the same id."""
    row = service.get_delivery(session, fleet_id, delivery_id)
    unchanged.check(session, row, lambda: service.delivery_detail(row))
    return DeliveryView.model_validate(service.redeliver(session, row, actor=actor))
