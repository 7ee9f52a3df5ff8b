"""Rules of enrolment. Each function works in its caller's transaction.

A certificate is issued when one of these holds, and else somebody has to approve the request:

- the device shows an enrolment token, and nobody holds a certificate for its id with another key;
- its key is the one that it was registered with, or has a certificate already: its request proves that it has the key.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from fleet_server import audit
from fleet_server.clock import utc_now
from fleet_server.enrolment import repository, tokens
from fleet_server.enrolment.ids import LISTENER_NAME, usable_id
from fleet_server.enrolment.schemas import EnrolmentCreate, EnrolmentState, RegistrationCreate, ServerCertificateCreate
from fleet_server.errors import (
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    TooManyRequestsError,
)
from fleet_server.models import Device, DeviceCertificate, DeviceIdentity, Enrolment, EnrolmentToken
from fleet_server.principals import DEFAULT_FLEET, Who
from fleet_server.trust.ca import FleetCa, IssuedCertificate, SigningRequest, read_request, verify_signature

PENDING_DAYS = 1
RETRY_PENDING_S = 60.0


@dataclass(frozen=True)
class Authority:
    """What issuing needs: the CA, how long certificates live, and how many requests may wait."""

    ca: FleetCa
    lifetime: dt.timedelta
    pending: int


def register(session: Session, fleet_id: str, wanted: RegistrationCreate, *, actor: Who) -> DeviceIdentity:
    """Let a device enrol, known by its id or by its key too.

    Raises:
        InvalidError: for an id that no device may have.
        ConflictError: when the id has an identity already.
    """
    usable_id(wanted.device_id)
    if session.get(DeviceIdentity, wanted.device_id) is not None:
        detail = f"device {wanted.device_id!r} has an identity already: revoke it first, or approve its request"
        raise ConflictError("device_registered", detail)
    identity = DeviceIdentity(
        device_id=wanted.device_id,
        fleet_id=fleet_id,
        key_sha256=wanted.key_sha256,
        tags=dict(wanted.tags),
        created_by=str(actor),
    )
    session.add(identity)
    session.flush()
    _audit(session, identity, actor, "device.pre_register", {"key_sha256": wanted.key_sha256})
    return identity


def enrol(session: Session, authority: Authority, wanted: EnrolmentCreate, address: str) -> Enrolment:
    """Decide about a device's request; the same request again gets the same answer.

    Raises:
        InvalidError: for an id or a signing request that can't be used.
        UnauthorizedError: for a token that is not valid (any longer).
        ForbiddenError: for a key that was locked out, or is not the registered one.
        TooManyRequestsError: when too many requests wait.
    """
    request = _request_of(usable_id(wanted.device_id), wanted.csr)
    now = utc_now()
    token = tokens.find(session, wanted, now)
    fleet_id = token.fleet_id if token else DEFAULT_FLEET
    identity = _held(session, wanted.device_id)
    _refuse_keys(session, identity, request)
    if identity is not None:
        fleet_id = identity.fleet_id
    if token is not None and token.fleet_id != fleet_id:
        raise tokens.refused("it is not for this device")
    repository.forget_old_requests(session, fleet_id, now - dt.timedelta(days=PENDING_DAYS))
    earlier = repository.enrolments(session, wanted.device_id, request.key_sha256)
    for one in earlier:
        if _answers_again(session, one, token, now):
            return one
    row = Enrolment(
        fleet_id=fleet_id,
        device_id=wanted.device_id,
        key_sha256=request.key_sha256,
        csr=wanted.csr,
        state=EnrolmentState.PENDING,
        reason="",
        address=address[:64],
        token_id=token.id if token else None,
    )
    row.reason = _why_to_wait(session, identity, request, token)
    if row.reason:
        if not [one for one in earlier if one.state == EnrolmentState.PENDING]:
            _bound_pending(session, authority, fleet_id)
        session.add(row)
        session.flush()
        return row
    if token is not None and not repository.use_token(session, token.id, now):
        raise tokens.refused("it was used up")
    if identity is None:
        assert token is not None
        identity = DeviceIdentity(
            device_id=wanted.device_id, fleet_id=fleet_id, tags=dict(token.tags), created_by=f"token {token.id}"
        )
        session.add(identity)
    elif token is not None:
        identity.tags = {**token.tags, **identity.tags}
    session.add(row)
    session.flush()
    _issue(session, authority, identity, request, row, actor=f"token {token.id}" if token else wanted.device_id)
    return row


def get_enrolment(session: Session, fleet_id: str, enrolment_id: str) -> Enrolment:
    """A request to enrol.

    Raises:
        NotFoundError: when the fleet has none of that id.
    """
    row = session.get(Enrolment, enrolment_id)
    if row is None or row.fleet_id != fleet_id:
        raise NotFoundError("enrolment", enrolment_id, remedy="list them with `shoal device pending`")
    return row


def decide(
    session: Session, authority: Authority, fleet_id: str, enrolment_id: str, *, approve: bool, actor: Who
) -> Enrolment:
    """Approve or reject a request that waits. Approval lets a device that was locked out in again, with its new key.

    Raises:
        NotFoundError: when the fleet has none of that id.
        ConflictError: when it was decided already.
    """
    row = get_enrolment(session, fleet_id, enrolment_id)
    if row.state != EnrolmentState.PENDING:
        raise ConflictError("enrolment_decided", f"enrolment {enrolment_id} is {row.state} already")
    if not approve:
        row.state, row.reason = EnrolmentState.REJECTED, "an operator rejected it"
        row.decided_at, row.decided_by = utc_now(), str(actor)
        audit.record(
            session,
            fleet_id=fleet_id,
            actor=actor,
            action="enrolment.reject",
            subject=f"device/{row.device_id}",
            detail={"key_sha256": row.key_sha256},
        )
        return row
    identity = _held(session, row.device_id)
    if identity is None:
        identity = DeviceIdentity(device_id=row.device_id, fleet_id=fleet_id, created_by=str(actor))
        session.add(identity)
        session.flush()
    else:
        # Who held the id before with another key is out: one device an id.
        if repository.revoke_certificates(session, row.device_id, utc_now()):
            identity.evict = True
        identity.revoked_at = None
    _issue(session, authority, identity, read_request(row.csr), row, actor=actor)
    for other in repository.pending_of(session, row.device_id):
        other.state, other.reason = EnrolmentState.REJECTED, "another request for this id was approved"
        other.decided_at, other.decided_by = utc_now(), str(actor)
    return row


def renew(session: Session, authority: Authority, device_id: str, csr: str, signature: bytes) -> DeviceCertificate:
    """A device's certificate for its next key; asked again with the same request, the same one.

    Args:
        session: a writing one.
        authority: the CA.
        device_id: whose topic the request came on.
        csr: of the next key, as PEM.
        signature: over the bytes of `csr`, by the key of a certificate the device has: the broker's word is not enough.

    Raises:
        InvalidError: when the request or its signature is wrong.
        ForbiddenError: when the device has no valid certificate, or is locked out.
    """
    identity = _held(session, device_id)
    if identity is None or identity.revoked_at is not None:
        raise ForbiddenError(
            "device_locked_out", f"device {device_id!r} has no identity here, or is locked out: enrol it"
        )
    request = _request_of(device_id, csr)
    now = utc_now()
    held = [
        one for one in repository.certificates(session, device_id) if one.revoked_at is None and one.not_after > now
    ]
    if not any(verify_signature(one.pem, signature, csr.encode()) for one in held):
        detail = "signature: it was not made by the key of a certificate that the device has; enrol it again"
        raise ForbiddenError("bad_signature", detail)
    for one in held:
        if one.key_sha256 == request.key_sha256 and (one.not_after - now) * 3 > one.not_after - one.not_before:
            return one
    issued = authority.ca.issue_device(request, device_id, identity.fleet_id, authority.lifetime)
    row = _keep(session, identity, issued)
    _audit(session, identity, device_id, "device.renew", {"serial": issued.serial, "key_sha256": issued.key_sha256})
    return row


def revoke(session: Session, fleet_id: str, device_id: str, *, actor: Who) -> DeviceIdentity:
    """Lock a device out: its certificates are revoked, its connection is ended, and what it says is ignored.

    Raises:
        NotFoundError: when the fleet has no such device.
    """
    identity = _held(session, device_id)
    device = session.get(Device, device_id)
    known = [one for one in (identity, device) if one is not None and one.fleet_id == fleet_id]
    if not known:
        raise NotFoundError("device", device_id, remedy="list them with `shoal device list`")
    now = utc_now()
    if identity is None:
        identity = DeviceIdentity(device_id=device_id, fleet_id=fleet_id, created_by=str(actor))
        session.add(identity)
    if identity.revoked_at is None:
        identity.revoked_at, identity.evict = now, True
    if device is not None:
        device.online = False
    session.flush()
    count = repository.revoke_certificates(session, device_id, now)
    for one in repository.pending_of(session, device_id):
        one.state, one.reason, one.decided_at, one.decided_by = EnrolmentState.REJECTED, "locked out", now, str(actor)
    _audit(session, identity, actor, "device.revoke", {"certificates": count})
    return identity


def issue_beside(
    session: Session, authority: Authority, fleet_id: str, wanted: ServerCertificateCreate, *, actor: Who
) -> IssuedCertificate:
    """A certificate for a broker of the operator's own, or for a program that listens to alerts of every fleet.

    Raises:
        InvalidError: for a signing request that can't be used.
    """
    request = read_request(wanted.csr)
    if wanted.purpose == "alerts":
        issued = authority.ca.issue_listener(request, LISTENER_NAME, DEFAULT_FLEET)
    else:
        issued = authority.ca.issue_server(request, wanted.names, fleet_id)
    audit.record(
        session,
        fleet_id=fleet_id,
        actor=actor,
        action="server_certificate.create",
        subject=f"certificate/{issued.serial}",
        detail={"purpose": wanted.purpose, "names": list(wanted.names), "key_sha256": issued.key_sha256},
    )
    return issued


def is_locked_out(session: Session, device_id: str) -> bool:
    """Whether a device's messages are to be ignored."""
    return bool(locked_out(session, [device_id]))


def locked_out(session: Session, device_ids: Sequence[str]) -> set[str]:
    """Those of these devices whose messages are to be ignored."""
    return repository.revoked(session, device_ids)


def _held(session: Session, device_id: str) -> DeviceIdentity | None:
    """The identity, locked until the transaction ends: of two requests for an id the second sees what the first did."""
    return session.get(DeviceIdentity, device_id, with_for_update=True)


def _request_of(device_id: str, csr: str) -> SigningRequest:
    request = read_request(csr)
    if request.common_name != device_id:
        detail = f"csr: its common name is {request.common_name[:80]!r}, not the device id {device_id!r}"
        raise InvalidError("bad_csr", detail, field="csr")
    return request


def _refuse_keys(session: Session, identity: DeviceIdentity | None, request: SigningRequest) -> None:
    if identity is None:
        return
    device_id = identity.device_id
    if repository.key_was_revoked(session, device_id, request.key_sha256):
        detail = f"this key of device {device_id!r} was locked out: make a new one (shoal-agent enroll --new-key)"
        raise ForbiddenError("key_locked_out", detail)
    first = not repository.has_certificate(session, device_id) and identity.revoked_at is None
    if first and identity.key_sha256 not in {None, request.key_sha256}:
        detail = f"device {device_id!r} is registered with another key: {identity.key_sha256}"
        raise ForbiddenError("wrong_key", detail)


def _why_to_wait(
    session: Session, identity: DeviceIdentity | None, request: SigningRequest, token: EnrolmentToken | None
) -> str:
    """Empty when a certificate may be issued at once."""
    if identity is not None and identity.revoked_at is not None:
        return "the device was locked out"
    if identity is not None:
        known = repository.certificate_of_key(session, identity.device_id, request.key_sha256) is not None
        if known or request.key_sha256 == identity.key_sha256:
            return ""
        if repository.has_certificate(session, identity.device_id):
            return "the id is held by a device with another key"
    return "" if token is not None else "it came without a token"


def _bound_pending(session: Session, authority: Authority, fleet_id: str) -> None:
    if repository.count_pending(session, fleet_id) >= authority.pending:
        detail = (
            f"{authority.pending} devices wait for approval, no more may: approve or reject them "
            "(shoal device pending), or enrol with a token"
        )
        raise TooManyRequestsError("too_many_enrolments", detail, retry_after_s=RETRY_PENDING_S)


def _issue(
    session: Session,
    authority: Authority,
    identity: DeviceIdentity,
    request: SigningRequest,
    row: Enrolment,
    *,
    actor: Who,
) -> None:
    issued = authority.ca.issue_device(request, identity.device_id, identity.fleet_id, authority.lifetime)
    _keep(session, identity, issued)
    row.state, row.reason, row.serial = EnrolmentState.ISSUED, "", issued.serial
    row.decided_at, row.decided_by = utc_now(), str(actor)
    detail = {"serial": issued.serial, "key_sha256": issued.key_sha256, "address": row.address}
    _audit(session, identity, actor, "device.enrol", detail)


def _keep(session: Session, identity: DeviceIdentity, issued: IssuedCertificate) -> DeviceCertificate:
    row = DeviceCertificate(
        serial=issued.serial,
        fleet_id=identity.fleet_id,
        device_id=identity.device_id,
        key_sha256=issued.key_sha256,
        pem=issued.pem,
        not_before=issued.not_before,
        not_after=issued.not_after,
    )
    session.add(row)
    session.flush()
    return row


def _answers_again(session: Session, earlier: Enrolment, token: EnrolmentToken | None, now: dt.datetime) -> bool:
    """Whether what became of an earlier request of the same key is the answer to this one."""
    if earlier.state == EnrolmentState.PENDING:
        return token is None
    same = token is None or earlier.token_id == token.id
    return same and earlier.serial is not None and _still_good(session, earlier.serial, now)


def _still_good(session: Session, serial: str, now: dt.datetime) -> bool:
    """With two thirds of its life before it, so that who asks again late gets a fresh one."""
    row = session.get(DeviceCertificate, serial)
    if row is None or row.revoked_at is not None:
        return False
    return (row.not_after - now) * 3 > (row.not_after - row.not_before) * 2


def _audit(session: Session, identity: DeviceIdentity, actor: Who, action: str, detail: dict[str, Any]) -> None:
    audit.record(
        session,
        fleet_id=identity.fleet_id,
        actor=actor,
        action=action,
        subject=f"device/{identity.device_id}",
        detail=detail,
    )
