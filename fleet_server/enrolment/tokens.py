"""Enrolment tokens: `shoal1.{pin of the CA}.{secret}`. Each function works in its caller's transaction."""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import secrets

from sqlalchemy.orm import Session

from fleet_server import audit
from fleet_server.clock import utc_now
from fleet_server.enrolment import repository
from fleet_server.enrolment.ids import usable_id
from fleet_server.enrolment.schemas import EnrolmentCreate, TokenCreate
from fleet_server.errors import NotFoundError, UnauthorizedError
from fleet_server.models import EnrolmentToken
from fleet_server.principals import Who

TOKEN = re.compile(r"^shoal1\.[0-9a-f]{64}\.([A-Za-z0-9_-]{32})\Z")
KEEP_DAYS = 30


def create(session: Session, fleet_id: str, wanted: TokenCreate, pin: str, *, actor: Who) -> tuple[EnrolmentToken, str]:
    """A new token and its text, which is not kept. 192 random bits need no slow hash."""
    secret = secrets.token_urlsafe(24)
    if wanted.device_id is not None:
        usable_id(wanted.device_id)
    now = utc_now()
    repository.forget_old_tokens(session, now - dt.timedelta(days=KEEP_DAYS))
    token = EnrolmentToken(
        fleet_id=fleet_id,
        secret_sha256=_hash(secret),
        device_id=wanted.device_id,
        tags=dict(wanted.tags),
        uses_left=wanted.uses,
        expires_at=now + dt.timedelta(seconds=wanted.ttl_s),
        created_by=str(actor),
    )
    session.add(token)
    session.flush()
    audit.record(
        session,
        fleet_id=fleet_id,
        actor=actor,
        action="enrolment_token.create",
        subject=f"enrolment_token/{token.id}",
        detail=wanted.model_dump(),
    )
    return token, f"shoal1.{pin}.{secret}"


def get(session: Session, fleet_id: str, token_id: str) -> EnrolmentToken:
    """A token, used up or not.

    Raises:
        NotFoundError: when there is none of that id.
    """
    token = session.get(EnrolmentToken, token_id)
    if token is None or token.fleet_id != fleet_id:
        raise NotFoundError("enrolment_token", token_id, remedy="list them with `shoal device token list`")
    return token


def delete(session: Session, fleet_id: str, token_id: str, *, actor: Who) -> None:
    """End a token before its time.

    Raises:
        NotFoundError: when there is none of that id.
    """
    get(session, fleet_id, token_id).uses_left = 0
    audit.record(
        session, fleet_id=fleet_id, actor=actor, action="enrolment_token.delete", subject=f"enrolment_token/{token_id}"
    )


def find(session: Session, wanted: EnrolmentCreate, now: dt.datetime) -> EnrolmentToken | None:
    """The token that a request shows; None when it shows none.

    Raises:
        UnauthorizedError: when it is unknown, expired, or for another device.
    """
    if wanted.token is None:
        return None
    parts = TOKEN.match(wanted.token)
    token = repository.token_by_hash(session, _hash(parts[1])) if parts else None
    if token is None or token.expires_at <= now:
        raise refused("it is unknown here, or expired")
    if token.device_id not in {None, wanted.device_id}:
        raise refused("it is for another device")
    return token


def refused(reason: str) -> UnauthorizedError:
    """The error of a token that does not serve."""
    return UnauthorizedError("bad_enrolment_token", f"token: {reason}; make one by `shoal device token create`")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
