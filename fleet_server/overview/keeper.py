"""Keeps how fleets are, once an hour, and removes what is too old, under a lease."""

from __future__ import annotations

import datetime as dt

from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.leases import DatabaseLease
from fleet_server.overview import repository, service
from fleet_server.settings import Settings
from fleet_server.telemetry.totals import HOUR_S, period_of
from fleet_server.ticker import Ticker

LEASE = "overview-keeper"
LEASE_S = 180.0
EVERY_S = 60.0


class OverviewKeeper:
    """The thread; of several servers on one database, one at a time."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
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
        with self._database.read() as session:
            fleets = repository.fleets_without_snapshot(session, period_of(now, HOUR_S))
        for fleet_id in fleets:
            if self._ticker.stopping or not self._lease.hold():
                return
            with self._database.read() as session:  # counting takes a moment: nobody waits for it to write
                found = service.take_snapshot(session, fleet_id, now)
            with self._database.write() as session:
                session.add(found)
        with self._database.write() as session:
            repository.forget_snapshots(session, now - dt.timedelta(days=self._settings.overview_days))
