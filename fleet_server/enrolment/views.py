"""Rows of enrolment as their HTTP shapes."""

from __future__ import annotations

import json

from sqlalchemy.orm import Session

from fleet_server.enrolment import repository
from fleet_server.enrolment.schemas import (
    CertificateView,
    ConductView,
    EnrolmentState,
    EnrolmentView,
    IdentitySummary,
    IdentityView,
)
from fleet_server.errors import NotFoundError
from fleet_server.models import Device, DeviceCertificate, DeviceConduct, DeviceIdentity, Enrolment
from fleet_server.trust import service as trust


def enrolment(session: Session, row: Enrolment, ca: str, broker: str) -> EnrolmentView:
    """What a device is answered."""
    certificate = session.get(DeviceCertificate, row.serial) if row.serial else None
    root = trust.metadata_file(session, row.fleet_id, "root.json") if certificate else None
    return EnrolmentView(
        id=row.id,
        device_id=row.device_id,
        fleet=row.fleet_id,
        state=EnrolmentState(row.state),
        key_sha256=row.key_sha256,
        reason=row.reason,
        certificate=certificate.pem if certificate else None,
        not_before=certificate.not_before if certificate else None,
        not_after=certificate.not_after if certificate else None,
        ca=ca,
        broker=broker,
        trust_root=json.loads(root) if root else None,
    )


def identity_summary(row: DeviceIdentity) -> IdentitySummary:
    """A row of the list."""
    return IdentitySummary(
        device_id=row.device_id,
        fleet=row.fleet_id,
        created_at=row.created_at,
        created_by=row.created_by,
        revoked_at=row.revoked_at,
    )


def identity(session: Session, fleet_id: str, device_id: str) -> IdentityView:
    """What is known of a device's identity.

    Raises:
        NotFoundError: when the fleet has neither a device nor an identity of that id.
    """
    row = session.get(DeviceIdentity, device_id)
    device = session.get(Device, device_id)
    if fleet_id not in {one.fleet_id for one in (row, device) if one is not None}:
        raise NotFoundError("device", device_id, remedy="list them with `shoal device list`")
    conduct = session.get(DeviceConduct, device_id)
    seen = ConductView.model_validate(conduct) if conduct else None
    if row is None:
        return IdentityView(device_id=device_id, registered=False, conduct=seen)
    return IdentityView(
        device_id=device_id,
        registered=True,
        key_sha256=row.key_sha256,
        created_at=row.created_at,
        created_by=row.created_by,
        revoked_at=row.revoked_at,
        evicted_at=row.evicted_at,
        certificates=[CertificateView.model_validate(one) for one in repository.certificates(session, device_id)],
        conduct=seen,
    )
