"""Every query over identities, certificates, tokens and requests to enrol."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from sqlalchemy import delete, func, select, true, update
from sqlalchemy.orm import Session

from fleet_server.db import question, scalars_by
from fleet_server.models import DeviceCertificate, DeviceIdentity, Enrolment, EnrolmentToken
from fleet_server.paging import PageRequest, Rows, TableList

TO_EVICT = question(select(DeviceIdentity.device_id).where(DeviceIdentity.evict == true()))
TOKENS = TableList(
    EnrolmentToken.id,
    {"created_at": EnrolmentToken.id, "expires_at": EnrolmentToken.expires_at},
    default="created_at",
    time=EnrolmentToken.created_at,
)
ENROLMENTS = TableList(
    Enrolment.id,
    {"created_at": Enrolment.id, "device_id": Enrolment.device_id, "state": Enrolment.state},
    default="-created_at",
    time=Enrolment.created_at,
)
IDENTITIES = TableList(
    DeviceIdentity.device_id,
    {"device_id": DeviceIdentity.device_id, "created_at": DeviceIdentity.created_at},
    default="device_id",
    time=DeviceIdentity.created_at,
)


def token_by_hash(session: Session, secret_sha256: str) -> EnrolmentToken | None:
    """A token by the hash of its secret."""
    return session.scalar(select(EnrolmentToken).where(EnrolmentToken.secret_sha256 == secret_sha256))


def use_token(session: Session, token_id: str, now: dt.datetime) -> bool:
    """Take one use of a token; false when there was none left. Two requests never take the same one."""
    taken = session.execute(
        update(EnrolmentToken)
        .where(EnrolmentToken.id == token_id, EnrolmentToken.uses_left > 0, EnrolmentToken.expires_at > now)
        .values(uses_left=EnrolmentToken.uses_left - 1)
        .returning(EnrolmentToken.id)
    )
    return taken.first() is not None


def tokens_page(session: Session, fleet_id: str, request: PageRequest, now: dt.datetime) -> Rows[EnrolmentToken]:
    """A page of the tokens that can be used."""
    query = select(EnrolmentToken).where(
        EnrolmentToken.fleet_id == fleet_id, EnrolmentToken.uses_left > 0, EnrolmentToken.expires_at > now
    )
    return TOKENS.scalars(session, query, request)


def forget_old_tokens(session: Session, before: dt.datetime) -> None:
    """Remove tokens that ended before a time."""
    session.execute(delete(EnrolmentToken).where(EnrolmentToken.expires_at < before))


def enrolments(session: Session, device_id: str, key_sha256: str) -> Sequence[Enrolment]:
    """The requests of a device with a key, newest first."""
    query = select(Enrolment).where(Enrolment.device_id == device_id, Enrolment.key_sha256 == key_sha256)
    return session.scalars(query.order_by(Enrolment.id.desc()).limit(10)).all()


def enrolments_page(
    session: Session, fleet_id: str, request: PageRequest, *, state: str | None, device: str | None
) -> Rows[Enrolment]:
    """A page of requests."""
    query = select(Enrolment).where(Enrolment.fleet_id == fleet_id)
    if state is not None:
        query = query.where(Enrolment.state == state)
    if device is not None:
        query = query.where(Enrolment.device_id == device)
    return ENROLMENTS.scalars(session, query, request)


def count_pending(session: Session, fleet_id: str) -> int:
    """How many requests wait for approval."""
    query = select(func.count()).select_from(Enrolment)
    return session.scalar(query.where(Enrolment.fleet_id == fleet_id, Enrolment.state == "pending")) or 0


def forget_old_requests(session: Session, fleet_id: str, before: dt.datetime) -> None:
    """Remove requests that wait, or were decided, since before a time."""
    session.execute(delete(Enrolment).where(Enrolment.fleet_id == fleet_id, Enrolment.created_at < before))


def pending_of(session: Session, device_id: str) -> Sequence[Enrolment]:
    """The requests of a device that wait."""
    return session.scalars(
        select(Enrolment).where(Enrolment.device_id == device_id, Enrolment.state == "pending")
    ).all()


def identities_page(
    session: Session, fleet_id: str, request: PageRequest, *, revoked: bool | None
) -> Rows[DeviceIdentity]:
    """A page of identities."""
    query = select(DeviceIdentity).where(DeviceIdentity.fleet_id == fleet_id)
    if revoked is not None:
        since = DeviceIdentity.revoked_at
        query = query.where(since.is_not(None) if revoked else since.is_(None))
    return IDENTITIES.scalars(session, query, request)


def certificates(session: Session, device_id: str, limit: int = 10) -> Sequence[DeviceCertificate]:
    """A device's certificates, newest first."""
    query = select(DeviceCertificate).where(DeviceCertificate.device_id == device_id)
    return session.scalars(query.order_by(DeviceCertificate.not_before.desc()).limit(limit)).all()


def certificate_of_key(session: Session, device_id: str, key_sha256: str) -> DeviceCertificate | None:
    """The newest certificate of a device with a key that was not revoked, expired or not."""
    query = select(DeviceCertificate).where(
        DeviceCertificate.device_id == device_id,
        DeviceCertificate.key_sha256 == key_sha256,
        DeviceCertificate.revoked_at.is_(None),
    )
    return session.scalar(query.order_by(DeviceCertificate.not_after.desc()).limit(1))


def key_was_revoked(session: Session, device_id: str, key_sha256: str) -> bool:
    """Whether a certificate of a device with that key was revoked."""
    query = select(DeviceCertificate.serial).where(
        DeviceCertificate.device_id == device_id,
        DeviceCertificate.key_sha256 == key_sha256,
        DeviceCertificate.revoked_at.is_not(None),
    )
    return session.scalar(query.limit(1)) is not None


def has_certificate(session: Session, device_id: str) -> bool:
    """Whether a device holds a certificate that was not revoked, expired or not."""
    query = select(DeviceCertificate.serial).where(
        DeviceCertificate.device_id == device_id, DeviceCertificate.revoked_at.is_(None)
    )
    return session.scalar(query.limit(1)) is not None


def revoke_certificates(session: Session, device_id: str, now: dt.datetime) -> int:
    """Revoke all that a device has; returns how many there were."""
    revoked = session.execute(
        update(DeviceCertificate)
        .where(DeviceCertificate.device_id == device_id, DeviceCertificate.revoked_at.is_(None))
        .values(revoked_at=now)
        .returning(DeviceCertificate.serial)
    )
    return len(revoked.all())


def revoked_serials(session: Session, now: dt.datetime) -> list[tuple[str, dt.datetime]]:
    """Serials that were revoked and would still be valid, with the times of it."""
    query = select(DeviceCertificate.serial, DeviceCertificate.revoked_at).where(
        DeviceCertificate.revoked_at.is_not(None), DeviceCertificate.not_after > now
    )
    return [(serial, since) for serial, since in session.execute(query.order_by(DeviceCertificate.serial)) if since]


def revoked(session: Session, device_ids: Sequence[str]) -> set[str]:
    """Those of these devices that are locked out."""
    query = select(DeviceIdentity.device_id).where(DeviceIdentity.revoked_at.is_not(None))
    return set(scalars_by(session, query, DeviceIdentity.device_id, device_ids))


def to_evict(session: Session) -> Sequence[DeviceIdentity]:
    """Devices whose connection is to be ended."""
    return session.scalars(select(DeviceIdentity).where(DeviceIdentity.evict.is_(True)).limit(100)).all()
