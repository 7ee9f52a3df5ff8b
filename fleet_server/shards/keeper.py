"""Looks after shard plans, under a lease: brings stages to their devices, and to others when those are lost."""

from __future__ import annotations

from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.errors import FleetError
from fleet_server.leases import DatabaseLease
from fleet_server.settings import Settings
from fleet_server.shards import deploying, repository
from fleet_server.shards.schemas import PlanState
from fleet_server.ticker import Ticker

EVERY_S = 1.0
LEASE_S = 15.0


class ShardKeeper:
    """The thread."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._lease = DatabaseLease(database, "shard-keeper", LEASE_S)
        self._ticker = Ticker("shard-keeper", self.tick, EVERY_S)

    def start(self) -> None:
        """Begin to look."""
        self._ticker.start()

    def stop(self) -> None:
        """End the thread."""
        self._ticker.stop()
        self._lease.give_back()

    def tick(self) -> None:
        """Do the next of what each plan needs."""
        if not self._lease.hold() or not self._database.finds(repository.HAS_OPEN):
            return
        with self._database.read() as session:
            plans = repository.open_plans(session)
        for one in plans:
            try:
                with self._database.write() as session:
                    plan = repository.open_plan(session, one)
                    if plan is not None:
                        deploying.step(session, self._settings, plan, utc_now())
            except FleetError as error:  # one plan must not keep the others
                with self._database.write() as session:
                    plan = repository.open_plan(session, one)
                    if plan is not None:
                        plan.state, plan.detail = PlanState.FAILED.value, error.detail
