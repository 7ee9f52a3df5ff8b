"""Tells devices again what they are to run when they do not say that they heard it.

What is said to a device is said at quality of service 1 and retained, and it answers at once. Yet a broker may lose
what it keeps, and either message may be dropped where too many wait; then nothing would happen until the device next
reports by itself, minutes later, and a stage of a rollout would wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from agent.protocol.topics import shard_of
from fleet_server.db import Database, pieces
from fleet_server.domain.reminders import Behind
from fleet_server.leases import DatabaseLease
from fleet_server.models import Deployment, Device
from fleet_server.rollouts import desired, repository
from fleet_server.settings import Settings
from fleet_server.ticker import Ticker

LEASE = "reminder"
LEASE_S = 60.0
EVERY_S = 20.0
PIECE = 100  # devices of one transaction


class Reminder:
    """The thread; of several servers on one database, one at a time. One that takes over waits anew.

    Args:
        database: where devices are.
        settings: what devices are told.
        every_s: seconds between looks.
    """

    def __init__(self, database: Database, settings: Settings, every_s: float = EVERY_S) -> None:
        self._database = database
        self._settings = settings
        self._behind = Behind()
        self._lease = DatabaseLease(database, LEASE, LEASE_S)
        self._ticker = Ticker(LEASE, lambda: self.tick(time.monotonic()), every_s)

    def start(self) -> None:
        """Begin to look."""
        self._ticker.start()

    def stop(self) -> None:
        """End the thread and give the lease back."""
        self._ticker.stop()
        self._lease.give_back()

    def tick(self, now: float) -> int:
        """Tell again whom it is time for; returns how many."""
        if not self._lease.hold():
            return 0
        with self._database.read() as session:
            behind = _behind(session)
        due = self._behind.due({device: revision for device, (_, revision) in behind.items()}, now)
        by_fleet: dict[str, list[str]] = {}
        for device in due:
            by_fleet.setdefault(behind[device][0], []).append(device)
        return sum(self._tell(ids) for ids in by_fleet.values())

    def _tell(self, ids: list[str]) -> int:
        """Tell devices of one fleet, those that are behind still."""
        told = 0
        for piece in pieces(ids, PIECE):
            with self._database.write() as session:
                found = session.scalars(select(Device).where(Device.id.in_(piece), *_IS_BEHIND)).all()
                desired.queue_all(session, self._settings, found, resend=True)
                told += len(found)
        return told


def tell_again(database: Database, settings: Settings, shards: Collection[int]) -> int:
    """Tell devices of some shards again what they are to run, where they have not settled on it; returns how many.

    Each answers with what it is at: for when their server ended, and what they said meanwhile went nowhere.
    """
    with database.read() as session:
        moving = select(Deployment.device_id).where(
            Deployment.desired, Deployment.phase.not_in(repository.SETTLED_PHASES)
        )
        wanted = or_(Device.id.in_(moving), Device.reported_revision != Device.desired_revision)
        query = select(Device.id, Device.fleet_id).where(Device.online, Device.forgotten_at.is_(None), wanted)
        by_fleet: dict[str, list[str]] = {}
        for device_id, fleet_id in session.execute(query):
            if shard_of(device_id) in shards:
                by_fleet.setdefault(fleet_id, []).append(device_id)
    for ids in by_fleet.values():
        for piece in pieces(ids, PIECE):
            with database.write() as session:
                found = session.scalars(select(Device).where(Device.id.in_(piece))).all()
                desired.queue_all(session, settings, found, resend=True)
    return sum(map(len, by_fleet.values()))


_IS_BEHIND = (Device.online, Device.reported_revision < Device.desired_revision, Device.forgotten_at.is_(None))


def _behind(session: Session) -> dict[str, tuple[str, int]]:
    """Fleet and desired revision of every device that is connected and behind."""
    rows = session.execute(select(Device.id, Device.fleet_id, Device.desired_revision).where(*_IS_BEHIND))
    return {device: (fleet_id, revision) for device, fleet_id, revision in rows}
