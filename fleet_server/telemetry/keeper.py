"""Rolls telemetry up and removes what is too old, under a lease, one small transaction after another."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from functools import partial

from sqlalchemy.orm import Session

from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.leases import DatabaseLease
from fleet_server.settings import Settings
from fleet_server.telemetry import rollups
from fleet_server.telemetry.totals import FLEET_S, HOUR_S
from fleet_server.ticker import Ticker

LEASE = "telemetry-keeper"
LEASE_S = 60.0
EVERY_S = 30.0
FLEET_DAYS = 1.0  # the last hour is asked for; devices send later than they measure
REST_S = 0.02  # between transactions: others write too


class TelemetryKeeper:
    """The thread; of several servers on one database, one at a time.

    Args:
        database: where everything is.
        settings: how long what is kept.
        every_s: seconds between looks. A window waits that long at most, and is in its hour then.
    """

    def __init__(self, database: Database, settings: Settings, every_s: float = EVERY_S) -> None:
        self._database = database
        self._settings = settings
        self._lease = DatabaseLease(database, LEASE, LEASE_S)
        self._ticker = Ticker(LEASE, lambda: self.tick(utc_now()), every_s)

    def start(self) -> None:
        """Begin to look."""
        self._ticker.start()

    def stop(self) -> None:
        """End the thread and give the lease back."""
        self._ticker.stop()
        self._lease.give_back()

    def tick(self, now: dt.datetime) -> None:
        """Do all that is due."""
        kept = self._settings
        ages: tuple[tuple[Callable[..., int], float], ...] = (
            (rollups.roll_up_windows, 0.0),
            (rollups.forget_windows, kept.telemetry_windows_days),
            (rollups.roll_up_hours, kept.telemetry_hours_days),
            (rollups.forget_days, kept.telemetry_days_days),
            (rollups.forget_hosts, kept.telemetry_hosts_days),
            (partial(rollups.forget_fleet_totals, step_s=FLEET_S), FLEET_DAYS),
            (partial(rollups.forget_fleet_totals, step_s=HOUR_S), kept.overview_days),
        )
        for step, days in ages:
            self._repeat(partial(step, before=now - dt.timedelta(days=days)))

    def _repeat(self, step: Callable[[Session], int]) -> None:
        """Until nothing is left; the lease is held anew each time."""
        while not self._ticker.stopping and self._lease.hold():
            with self._database.write() as session:
                done = step(session)
            if done == 0:
                return
            self._ticker.rest(REST_S)
