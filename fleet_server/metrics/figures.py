"""Figures of the database for `/metrics`: counted now and then, however often somebody asks."""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from agent.protocol.lifecycle import Phase
from fleet_server.db import UNAVAILABLE, Database
from fleet_server.domain.states import RolloutState
from fleet_server.metrics.repository import OPEN_DELIVERIES, OPEN_JOBS, Census, census

log = logging.getLogger(__name__)
EVERY_S = 5.0
SHARE = 20  # counting takes at most a twentieth of the time of one connection
FLEETS = 200  # that are told apart
OTHERS = "_others"
PHASES = ("scheduled", *(phase.value for phase in Phase))


class Figures:
    """What was counted last, and when it is counted anew. Thread-safe: one counts, and nobody waits for it.

    Args:
        database: where everything is.
        monotonic: a clock in seconds.
    """

    def __init__(self, database: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._known: Census | None = None
        self._counted_at = 0.0
        self._again_at = 0.0
        self.took_s = 0.0

    def latest(self) -> Census | None:
        """What is known: counted now, when what is known is old; None while the database never answered."""
        if self._monotonic() >= self._again_at and self._lock.acquire(blocking=self._known is None):
            try:
                if self._monotonic() >= self._again_at:
                    self._count()
            finally:
                self._lock.release()
        return self._known

    @property
    def age_s(self) -> float | None:
        """How long ago what is known was counted, in seconds; None when nothing is."""
        return None if self._known is None else self._monotonic() - self._counted_at

    def _count(self) -> None:
        started = self._monotonic()
        try:
            with self._database.read() as session:
                self._known = census(session)
            self._counted_at = started
        except UNAVAILABLE as error:
            log.warning("the figures of /metrics stay as they are, for the database does not answer: %s", error)
        self.took_s = self._monotonic() - started
        self._again_at = self._monotonic() + max(EVERY_S, SHARE * self.took_s)


class FigureCollector(Collector):
    """The figures as Prometheus takes them.

    Args:
        figures: counts.
        now: by the wall clock.
        fleet_id: of the one fleet that is told; None for all, and for what belongs to none.
    """

    def __init__(self, figures: Figures, now: Callable[[], dt.datetime], fleet_id: str | None = None) -> None:
        self._figures = figures
        self._now = now
        self._fleet_id = fleet_id

    def describe(self) -> Iterable[Metric]:
        """Nothing: so that registering asks no database."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every figure; where the database never answered, none."""
        known = self._figures.latest()
        if known is None:
            return
        fleets = self._fleets(known)
        devices = {
            (fleet, "online" if online else "offline"): count for (fleet, online), count in known.devices.items()
        }
        yield _by_fleet(
            "shoal_devices", "Devices that the fleet knows.", "state", ("online", "offline"), devices, fleets
        )
        states = tuple(one.value for one in RolloutState)
        yield _by_fleet(
            "shoal_rollouts", "Rollouts, those that have ended too.", "state", states, known.rollouts, fleets
        )
        yield _by_fleet(
            "shoal_deployments", "Deployments of rollouts that have not ended.", "phase", PHASES,
            known.deployments, fleets,
        )  # fmt: skip
        if self._fleet_id is None:
            yield from self._of_the_server(known)

    def _fleets(self, known: Census) -> Mapping[str, str]:
        """Each fleet that is told, and as what."""
        if self._fleet_id is not None:
            return {self._fleet_id: self._fleet_id}
        found = sorted({fleet for fleet, _ in (*known.devices, *known.rollouts)})
        return {fleet: fleet if place < FLEETS else OTHERS for place, fleet in enumerate(found)}

    def _of_the_server(self, known: Census) -> Iterator[Metric]:
        yield _by_state("shoal_conversion_jobs", "Conversions that wait or run.", OPEN_JOBS, known.conversions)
        yield _by_state(
            "shoal_webhook_deliveries", "Events that webhooks have not taken: yet, or for good.", OPEN_DELIVERIES,
            known.deliveries,
        )  # fmt: skip
        yield GaugeMetricFamily("shoal_outbox_messages", "Messages that wait for the broker.", known.outbox)
        waited = 0.0 if known.outbox_since is None else (self._now() - known.outbox_since).total_seconds()
        yield GaugeMetricFamily("shoal_outbox_oldest_seconds", "How long the oldest of them waits.", max(0.0, waited))
        yield GaugeMetricFamily(
            "shoal_figures_age_seconds", "How old the counts of the database are.", self._figures.age_s
        )
        yield GaugeMetricFamily("shoal_figures_duration_seconds", "How long counting took.", self._figures.took_s)


def _by_fleet(
    name: str,
    meaning: str,
    label: str,
    values: Iterable[str],
    counts: Mapping[tuple[str, str], int],
    fleets: Mapping[str, str],
) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=("fleet", label))
    totals = {(shown, value): 0 for shown in fleets.values() for value in values}
    for (fleet, value), count in counts.items():
        if fleet in fleets:
            totals[fleets[fleet], value] = totals.get((fleets[fleet], value), 0) + count
    for labels, total in totals.items():
        family.add_metric(labels, total)
    return family


def _by_state(name: str, meaning: str, states: Iterable[str], counts: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=("state",))
    for state in states:
        family.add_metric((state,), counts.get(state, 0))
    return family
