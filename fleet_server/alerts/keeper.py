"""Looks at alert rules and tells routes, under a lease: of several servers on one database, one at a time."""

from __future__ import annotations

import datetime as dt
import logging

from fleet_server.alerts import repository
from fleet_server.alerts.evaluation import evaluate
from fleet_server.alerts.schemas import RuleSpec
from fleet_server.alerts.shipped import SHIPPED, ship
from fleet_server.alerts.telling import tell_due
from fleet_server.clock import utc_now
from fleet_server.db import UNAVAILABLE, Database
from fleet_server.domain.alerting import KINDS
from fleet_server.leases import DatabaseLease
from fleet_server.models import AlertRule
from fleet_server.settings import Settings
from fleet_server.ticker import Ticker

log = logging.getLogger(__name__)
LEASE = "alert-keeper"
LEASE_S = 15.0  # at least, and three turns: who takes over too early looks at what was looked at, and finds nothing new
SWEEP_TICKS = 360


class AlertKeeper:
    """The thread. A server that takes over looks at every rule at once; what is pending goes on where it was."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._lease = DatabaseLease(database, LEASE, max(LEASE_S, 3 * settings.alert_tick_s))
        self._ticker = Ticker(LEASE, lambda: self.tick(utc_now()), settings.alert_tick_s)
        self._turn = 0
        self._looked: dict[str, int] = {}  # turn of the last look at each rule

    def start(self) -> None:
        """Begin to look."""
        self._ticker.start()

    def stop(self) -> None:
        """End the thread and give the lease back."""
        self._ticker.stop()
        self._lease.give_back()

    def tick(self, now: dt.datetime) -> None:
        """Look at every rule whose turn it is, and tell what is due; a rule that fails keeps no other waiting."""
        if not self._lease.hold():
            self._looked = {}
            return
        self._turn += 1
        self._ship()
        with self._database.read() as session:
            rules = {one.id: KINDS[RuleSpec.model_validate(one.spec).metric].ticks
                     for one in repository.rows_of(session, AlertRule)}  # fmt: skip
        self._looked = {rule: turn for rule, turn in self._looked.items() if rule in rules}
        for rule_id, ticks in rules.items():
            if rule_id in self._looked and self._turn - self._looked[rule_id] < ticks:
                continue
            if self._ticker.stopping or not self._lease.hold():
                return
            self._looked[rule_id] = self._turn
            try:
                evaluate(self._database, self._settings, rule_id, now)
            except UNAVAILABLE:
                raise
            except Exception:
                log.exception("alert rule %s could not be looked at; it is tried again", rule_id)
        tell_due(self._database, now)
        if self._turn % SWEEP_TICKS == 1:
            with self._database.write() as session:
                repository.forget_alerts(session, now - dt.timedelta(days=self._settings.alert_days))

    def _ship(self) -> None:
        with self._database.read() as session:
            waiting = repository.fleets_without_defaults(session, SHIPPED)
        for fleet_id in waiting:
            with self._database.write() as session:
                ship(session, fleet_id)
