"""Ends requests for samples whose time is over, and deletes samples that were kept long enough, under a lease."""

from __future__ import annotations

import datetime as dt

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.leases import DatabaseLease
from fleet_server.samples import service
from fleet_server.samples.schemas import SAMPLES_FOLDER
from fleet_server.settings import Settings
from fleet_server.ticker import Ticker

LEASE = "sample-keeper"
LEASE_S = 60.0
EVERY_S = 2.0
FORGET_EVERY = dt.timedelta(minutes=1)


class SampleKeeper:
    """The thread; of several servers on one database, one at a time."""

    def __init__(self, database: Database, artifacts: ArtifactStore, settings: Settings) -> None:
        self._database = database
        self._store = artifacts.below(SAMPLES_FOLDER)
        self._settings = settings
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
        with self._database.write() as session:
            service.expire(session, self._settings, now)
        if now < self._forget_at:
            return
        self._forget_at = now + FORGET_EVERY
        before = now - dt.timedelta(days=self._settings.samples_days)
        while not self._ticker.stopping and self._lease.hold():
            with self._database.write() as session:
                if service.forget_old(session, self._store, before) == 0:
                    return
