"""The shards whose devices this server hears: rows that servers share out among those of them that live.

What is decided is `fleet_server.domain.device_shards`; here are the rows, and what this server knows of them.
"""

from __future__ import annotations

import logging
import time

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from agent.protocol.topics import shard_of, shard_of_digest
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.domain.device_shards import EVERY, Holding, turn
from fleet_server.models import DeviceShard
from fleet_server.servers import LEASE, Membership

log = logging.getLogger(__name__)
MARGIN_S = 2.0  # before its membership ends a server sends nothing for its shards any more


class DeviceShards:
    """Stepped by one thread; what it says may be asked by any.

    Args:
        database: with the rows.
        membership: this server among the others.

    Attributes:
        held: this server's shards.
        given: shards that it gave up and still hears, until another does.
        alone: whether no other server lives.
        unconfirmed: it has not said yet that it hears the devices of all shards that it took.
    """

    def __init__(self, database: Database, membership: Membership) -> None:
        self._database = database
        self._membership = membership
        self.held: frozenset[int] = frozenset()
        self.given: frozenset[int] = frozenset()
        self.alone = True
        self.unconfirmed = False
        self._sure_until = 0.0

    @property
    def heard(self) -> frozenset[int]:
        """Shards of the devices whose messages this server handles."""
        return self.held | self.given

    @property
    def sure(self) -> frozenset[int]:
        """Shards that are this server's beyond doubt, by its own clock: none while the database is away for long."""
        return self.held if time.monotonic() < self._sure_until else frozenset()

    def hears(self, device_id: str) -> bool:
        """Whether a device's messages are this server's to handle."""
        return shard_of(device_id) in self.heard

    def streams(self, digest: str) -> bool:
        """Whether a content is this server's to send: one of all servers sends it, to the devices of all."""
        return shard_of_digest(digest) in self.held

    def step(self) -> frozenset[int]:
        """Live on, take and give; returns shards that were taken of servers which do not live any more."""
        began, me = time.monotonic(), self._membership.name
        with self._database.write() as session:
            servers = self._membership.renew(session, utc_now())
            found = turn(me, servers, _read(session))
            if found.take or found.give:  # again, with nobody else at it
                found = turn(me, servers, _locked(session))
                _let_own(session, found.take, me)
                _let_own(session, found.give, "")
        mine, alone = found.keep | found.take, len(servers) == 1
        if (mine, alone) != (self.held, self.alone):
            log.info(
                "this server hears the devices of %d shards of %d; servers: %d", len(mine), len(EVERY), len(servers)
            )
        self.given = (self.given | found.give) - found.settled - mine
        self.held, self.alone = mine, alone
        self.unconfirmed = self.unconfirmed or bool(found.take)
        self._sure_until = began + LEASE.total_seconds() - MARGIN_S
        return found.orphaned

    def confirm(self) -> None:
        """Say that this server hears the devices of its shards: who gave them up need not hear them any more."""
        with self._database.write() as session:
            mine = DeviceShard.owner == self._membership.name, DeviceShard.confirmed.is_(False)
            session.execute(update(DeviceShard).where(*mine).values(confirmed=True))
        self.unconfirmed = False

    def leave(self) -> None:
        """Give everything up and be no member any more; `given` is heard on until others do (`follow`)."""
        with self._database.write() as session:
            self._membership.leave(session, utc_now())
            mine = DeviceShard.owner == self._membership.name
            session.execute(update(DeviceShard).where(mine).values(owner="", confirmed=False))
        self.held, self.given = frozenset(), self.heard

    def follow(self) -> None:
        """See which of the shards that were given up others hear by now."""
        with self._database.read() as session:
            servers = self._membership.living(session, utc_now())
            self.given -= turn(self._membership.name, servers, _read(session)).settled
        self.alone = not servers


def _locked(session: Session) -> dict[int, Holding]:
    found = _read(session, lock=True)
    absent = [{"shard": shard, "owner": "", "confirmed": False} for shard in sorted(EVERY - set(found))]
    if absent:
        session.execute(insert(DeviceShard), absent)
        found = _read(session, lock=True)
    return found


def _read(session: Session, *, lock: bool = False) -> dict[int, Holding]:
    query = select(DeviceShard.shard, DeviceShard.owner, DeviceShard.confirmed)
    if lock:
        query = query.order_by(DeviceShard.shard).with_for_update()
    return {shard: Holding(owner, confirmed) for shard, owner, confirmed in session.execute(query)}


def _let_own(session: Session, shards: frozenset[int], owner: str) -> None:
    if shards:
        where = DeviceShard.shard.in_(sorted(shards))
        session.execute(update(DeviceShard).where(where).values(owner=owner, confirmed=False))
