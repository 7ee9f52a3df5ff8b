"""Leases in the database: of several servers, one at a time does what a lease is for."""

from __future__ import annotations

import datetime as dt

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet_server.clock import utc_now
from fleet_server.db import Database, new_id
from fleet_server.models import Lease
from fleet_server.principals import DEFAULT_FLEET


class DatabaseLease:
    """One server's claim on a lease.

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

    def hold(self) -> bool:
        """Take it, or hold it for longer; false while another server holds it."""
        now = utc_now()
        with self._database.write() as session:
            lease = self._locked(session)
            if lease is None:
                until = now + self._lasts
                session.add(Lease(name=self._name, fleet_id=DEFAULT_FLEET, owner=self._owner, until=until))
                return True
            if lease.owner != self._owner and lease.until > now:
                return False
            lease.owner, lease.until = self._owner, now + self._lasts
            return True

    def give_back(self) -> None:
        """Let another server have it at once, where this one holds it."""
        with self._database.write() as session:
            lease = self._locked(session)
            if lease is not None and lease.owner == self._owner:
                session.delete(lease)

    def _locked(self, session: Session) -> Lease | None:
        return session.scalar(select(Lease).where(Lease.name == self._name).with_for_update())
