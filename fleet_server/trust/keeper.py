"""Keeps a fleet's metadata fresh: makes what is missing, signs what waits and what expires soon, under a lease."""

from __future__ import annotations

from fleet_server.db import Database
from fleet_server.leases import DatabaseLease
from fleet_server.settings import Settings
from fleet_server.ticker import Ticker
from fleet_server.trust import repository, service

LEASE = "trust-keeper"
TICK_S = 5.0
LEASE_S = 60.0


class TrustKeeper:
    """The thread that signs; of several servers on one database, one at a time."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._lease = DatabaseLease(database, LEASE, LEASE_S)
        self._ticker = Ticker(LEASE, self.tick, TICK_S)

    def start(self) -> None:
        """Sign once, so that devices find metadata, and begin to tick."""
        self._ticker.call()
        self._ticker.start()

    def stop(self) -> None:
        """End the thread and give the lease back."""
        self._ticker.stop()
        self._lease.give_back()

    def tick(self) -> None:
        """Bring every fleet's metadata up to date, each in a transaction of its own."""
        if not self._lease.hold():
            return
        with self._database.read() as session:
            fleets = repository.fleets(session)
        for fleet_id in fleets:
            with self._database.write() as session:
                service.ensure(session, self._settings, fleet_id)
                service.advance(session, self._settings, fleet_id)
