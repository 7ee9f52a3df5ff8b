"""HTTP shapes of webhooks and deliveries."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

from pydantic import Field, field_validator

from fleet_server.schemas import Request, Response, example
from fleet_server.webhooks.schedule import DeliveryState
from fleet_server.webhooks.signing import key_of

EventType = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9_.*]{1,128}$",
        description="Such as `shoal.rollout.paused` or `shoal.deployment.*`; a `*` stands for any characters.",
    ),
]
EventTypes = Annotated[list[EventType], Field(min_length=1, max_length=50)]
Url = Annotated[str, Field(min_length=1, max_length=2048, description="`https://…`; redirects are not followed.")]
Description = Annotated[str, Field(max_length=256)]


class WebhookCreate(Request):
    """Where to tell of which events."""

    model_config = example(url="https://ops.example/hooks/shoal", types=["shoal.rollout.*"], description="the pager")

    url: Url
    types: EventTypes
    description: Description = ""
    active: bool = True
    secret: str | None = Field(
        None, max_length=128, description="`whsec_` and base64 of 24 to 64 random bytes; made when absent."
    )

    @field_validator("secret")
    @classmethod
    def _is_a_secret(cls, value: str | None) -> str | None:
        if value is not None:
            key_of(value)
        return value


class WebhookUpdate(Request):
    """What to change of a webhook; absent fields stay as they are."""

    model_config = example(active=False)

    url: Url | None = None
    types: EventTypes | None = None
    description: Description | None = None
    active: bool | None = Field(None, description="What waits while it is not is sent when it is again.")


class SecretRotation(Request):
    """How to change to a new secret."""

    model_config = example(overlap_hours=24)

    overlap_hours: float = Field(24.0, ge=0, le=24 * 14, description="How long the old secret signs too, in hours.")


class WebhookView(Response):
    """A webhook, without its secret."""

    id: str
    url: str
    types: list[str]
    description: str
    active: bool
    stopped_because: str = Field(description="Why the server made it inactive; empty when it did not.")
    old_secret_until: dt.datetime | None = Field(description="Until when the secret before signs too.")
    created_by: str
    created_at: dt.datetime


class WebhookSecret(WebhookView):
    """A webhook with its new secret."""

    secret: str = Field(description="Shown this once. Signatures are those of Standard Webhooks.")


class DeliveryView(Response):
    """One event for one webhook."""

    observed = frozenset({"next_at", "attempts", "last_status", "last_detail"})

    id: str
    webhook_id: str
    event_id: str = Field(description="In the header `webhook-id`, and the CloudEvent's id: the same on every try.")
    type: str
    subject: str
    state: DeliveryState
    attempts: int
    next_at: dt.datetime = Field(description="When it is sent next, while it is pending.")
    last_status: int | None = Field(description="Of the last answer; null when none came.")
    last_detail: str
    created_at: dt.datetime
    finished_at: dt.datetime | None


class DeliveryDetail(DeliveryView):
    """A delivery with what is sent."""

    event: dict[str, Any] = Field(description="The CloudEvent.")
