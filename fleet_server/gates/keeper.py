"""Ends gate runs whose time is over. Several servers may do so at once: a run's row is locked while it is ended."""

from __future__ import annotations

import logging
import threading

from fleet_server.db import Database, utc_now
from fleet_server.gates import service
from fleet_server.settings import Settings

log = logging.getLogger(__name__)
EVERY_S = 2.0


class GateKeeper:
    """The thread."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look."""
        self._thread = threading.Thread(target=self._loop, name="gate-keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(10)

    def _loop(self) -> None:
        while not self._stopping.wait(EVERY_S):
            try:
                with self._database.write() as session:
                    service.expire(session, self._settings, utc_now())
            except Exception:
                log.exception("looking for overdue gate runs failed; it goes on")
