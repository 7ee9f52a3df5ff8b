"""What a restored database must not say again: devices have seen later things, and refuse what is older.

- Revisions of desired states go far beyond whatever devices can have seen: a device ignores one that is not larger.
- The keys of TUF's snapshot and timestamp are replaced, which is how its clients are told that versions begin anew
  (TUF specification, 5.3.11): they would refuse lower ones. That takes the root's keys.
- Serials of orders in bundles go on beyond those that devices can have followed.
- What servers were about to do, and who they were, is forgotten: it is long over.
"""

from __future__ import annotations

import msgspec
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from agent.protocol.bundle import read_order
from fleet_server import audit
from fleet_server.backup.contents import Index
from fleet_server.models import Device, DeviceShard, Fleet, IdempotencyKey, Lease, OutboxMessage, Server, TrustTarget
from fleet_server.settings import Settings
from fleet_server.trust.metadata import BUNDLES
from fleet_server.trust.roots import replace_online_keys
from fleet_server.trust.service import advance, state

BEYOND = 1_000_000  # changes of one device's desired state that a backup may be behind
LARGEST = 2**31 - 1
ACTOR = "restore"


def move_on(session: Session, settings: Settings, index: Index) -> list[str]:
    """Bring restored rows to where devices follow them; returns fleets that need their operators' root keys."""
    for table in (Lease, Server, DeviceShard, OutboxMessage):
        session.execute(delete(table))
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.status.is_(None)))
    session.execute(update(Device).values(online=False, boot_id=None, reported_sequence=0))
    room = Device.desired_revision < LARGEST - BEYOND  # only a device that lies about what it saw has none
    session.execute(update(Device).where(room).values(desired_revision=Device.desired_revision + BEYOND))
    offline = []
    for fleet_id in session.scalars(select(Fleet.id).order_by(Fleet.id)).all():
        audit.record(
            session,
            fleet_id=fleet_id,
            actor=ACTOR,
            action="server.restore",
            subject="server",
            detail={"made_at": index.made_at, "version": index.version},
        )
        if state(session, fleet_id) is None:
            continue
        _raise_serials(session, fleet_id)
        if not replace_online_keys(session, settings, fleet_id, actor=ACTOR):
            offline.append(fleet_id)
        else:
            advance(session, settings, fleet_id)
    return offline


def _raise_serials(session: Session, fleet_id: str) -> None:
    query = select(TrustTarget).where(TrustTarget.fleet_id == fleet_id, TrustTarget.role == BUNDLES)
    for target in session.scalars(query):
        order = read_order(target.manifest)
        target.manifest = msgspec.json.encode(msgspec.structs.replace(order, serial=order.serial + BEYOND))
    session.flush()
