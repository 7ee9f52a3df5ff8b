"""Ends gate runs whose time is over. Several servers may do so at once: a run's row is locked while it is ended."""

from __future__ import annotations

from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.gates import repository, service
from fleet_server.settings import Settings
from fleet_server.ticker import Ticker

EVERY_S = 2.0


class GateKeeper:
    """The thread."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._ticker = Ticker("gate-keeper", self.tick, EVERY_S)

    def start(self) -> None:
        """Begin to look."""
        self._ticker.start()

    def stop(self) -> None:
        """End the thread."""
        self._ticker.stop()

    def tick(self) -> None:
        """End those that are overdue now."""
        if not self._database.finds(repository.HAS_RUNNING):
            return
        with self._database.write() as session:
            service.expire(session, self._settings, utc_now())
