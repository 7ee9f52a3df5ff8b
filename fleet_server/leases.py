"""Leases in the database: of several servers, one at a time does what a lease is for."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.clock import utc_now
from fleet_server.db import Database, new_id
from fleet_server.models import Lease
from fleet_server.principals import DEFAULT_FLEET

RENEWED = 0.75  # of a lease's time: who has more left than this need not say so again
NEVER = dt.datetime.min.replace(tzinfo=dt.UTC)


class DatabaseLease:
    """One server's claim on a lease. It costs the database something when it is renewed, not each time it is asked for.

    Args:
        database: where it is.
        name: of the lease.
        seconds: how long it holds unless it is held anew, so that of a server that died another takes it over. One that
            starts again has what it had, where the database was given an owner.
    """

    def __init__(self, database: Database, name: str, seconds: float) -> None:
        self._database = database
        self._name = name
        self._lasts = dt.timedelta(seconds=seconds)
        self._owner = database.owner or new_id()
        self._until = NEVER  # as the database has it, where this server holds it

    def hold(self) -> bool:
        """Take it, or hold it for longer; false while another server holds it.

        Where true, it is this server's for three quarters of its time at least.
        """
        now = utc_now()
        if RENEWED * self._lasts < self._until - now <= self._lasts:
            return True
        if self._others(now):
            self._until = NEVER
            return False
        until = now + self._lasts
        with self._database.write() as session:
            lease = self._locked(session)
            if lease is None:
                session.add(Lease(name=self._name, fleet_id=DEFAULT_FLEET, owner=self._owner, until=until))
            elif lease.owner != self._owner and lease.until > now:
                return False
            else:
                lease.owner, lease.until = self._owner, until
        self._until = until
        return True

    def _others(self, now: dt.datetime) -> bool:
        """Whether another server holds it, read without a lock: of many servers all but one ask all the time."""
        with self._database.read() as session:
            lease = session.get(Lease, self._name)
            return lease is not None and lease.owner != self._owner and lease.until > now

    def give_back(self) -> None:
        """Let another server have it at once, where this one holds it."""
        self._until = NEVER
        with self._database.write() as session:
            lease = self._locked(session)
            if lease is not None and lease.owner == self._owner:
                session.delete(lease)

    def _locked(self, session: Session) -> Lease | None:
        return session.scalar(select(Lease).where(Lease.name == self._name).with_for_update())
