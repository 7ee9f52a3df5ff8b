"""Ends commands whose time is over, tells devices again, and forgets what was kept long enough, under a lease."""

from __future__ import annotations

import datetime as dt

from fleet_server.clock import utc_now
from fleet_server.commands import repository, service
from fleet_server.db import Database
from fleet_server.leases import DatabaseLease
from fleet_server.settings import Settings
from fleet_server.ticker import Ticker

LEASE = "command-keeper"
LEASE_S = 60.0
EVERY_S = 1.0
FORGET_EVERY = dt.timedelta(minutes=1)
PIECE = 100


class CommandKeeper:
    """The thread; of several servers on one database, one at a time."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._keep = dt.timedelta(days=settings.commands_days)
        self._forget_at = utc_now()
        self._lease = DatabaseLease(database, LEASE, LEASE_S)
        self._ticker = Ticker(LEASE, lambda: self.tick(utc_now()), EVERY_S)

    def start(self) -> None:
        """Begin to look."""
        self._ticker.start()

    def stop(self) -> None:
        """End the thread and give the lease back."""
        self._ticker.stop()
        self._lease.give_back()

    def tick(self, now: dt.datetime) -> None:
        """Do all that is due."""
        if not self._lease.hold():
            return
        if self._database.finds(repository.HAS_OPEN):
            with self._database.write() as session:
                service.expire(session, now)
                service.send_again(session, now)
        if now < self._forget_at:
            return
        self._forget_at = now + FORGET_EVERY
        while not self._ticker.stopping and self._lease.hold():
            with self._database.write() as session:
                if repository.forget_before(session, now - self._keep, PIECE) == 0:
                    return
