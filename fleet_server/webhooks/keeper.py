"""Sends what is due: of several servers on one database, one at a time, under a lease; at least once.

Each webhook has a few of the threads at most, so that one that answers slowly, or never, holds up no other.
"""

from __future__ import annotations

import datetime as dt
import logging
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.leases import DatabaseLease
from fleet_server.models import Webhook
from fleet_server.settings import Settings
from fleet_server.ticker import Ticker
from fleet_server.webhooks import repository, service, signing
from fleet_server.webhooks.schedule import DeliveryState
from fleet_server.webhooks.sending import post

log = logging.getLogger(__name__)
LEASE = "webhook-keeper"
LEASE_S = 30.0
TICK_S = 0.5
THREADS = 32
EACH = 2  # threads that one webhook may have
KEEP_DELIVERED = dt.timedelta(days=7)
KEEP_DEAD = dt.timedelta(days=30)
SWEEP_EVERY_S = 600.0
CONTENT_TYPE = "application/cloudevents+json; charset=utf-8"


@dataclass(frozen=True)
class _Letter:
    """One delivery, ready to be sent."""

    id: str
    webhook_id: str
    subject: str
    event_id: str
    url: str
    secrets: list[str]
    body: bytes


class WebhookKeeper:
    """The thread that looks for what is due, and those that send it."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._lease = DatabaseLease(database, LEASE, LEASE_S)
        self._lock = threading.Lock()
        self._flying: set[tuple[str, str]] = set()  # webhook and subject
        self._pool = ThreadPoolExecutor(THREADS, "webhook-sender")
        self._ticker = Ticker(LEASE, self.tick, TICK_S, at_once=True)
        self._lifetime = dt.timedelta(hours=settings.webhook_retry_hours)
        self._swept_at: dt.datetime | None = None

    def start(self) -> None:
        """Begin to look."""
        self._ticker.start()

    def stop(self) -> None:
        """End the threads and give the lease back; what is being sent is waited for, as long as a send may take."""
        self._ticker.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._lease.give_back()

    def tick(self) -> None:
        """Hand what is due to the threads."""
        now = utc_now()
        self._sweep(now)
        if not self._database.finds(repository.HAS_PENDING):
            return
        with self._database.read() as session:
            waiting = repository.with_due(session, now)
        letters = [letter for one in waiting for letter in self._letters(one, now)]
        if not letters or not self._lease.hold():
            return
        for letter in letters:
            with self._lock:
                self._flying.add((letter.webhook_id, letter.subject))
            self._pool.submit(self._send, letter)

    def _letters(self, webhook_id: str, now: dt.datetime) -> list[_Letter]:
        with self._lock:
            flying = Counter(one for one, _ in self._flying)
            free = min(EACH - flying[webhook_id], THREADS - flying.total())
            besides = [subject for one, subject in self._flying if one == webhook_id]
        if free <= 0:
            return []
        # Read after that: what has landed since is seen to be settled, and not sent twice.
        with self._database.read() as session:
            webhook = session.get(Webhook, webhook_id)
            if webhook is None:
                return []
            secrets = service.secrets_of(webhook, now)
            found = repository.due(session, webhook_id, now, besides=besides, limit=free)
            return [
                _Letter(one.id, webhook_id, one.subject, one.event_id, webhook.url, secrets, one.body.encode())
                for one in found
            ]

    def _send(self, letter: _Letter) -> None:
        try:
            now = utc_now()
            headers = signing.headers(letter.secrets, letter.event_id, int(now.timestamp()), letter.body)
            headers |= {"Content-Type": CONTENT_TYPE, "User-Agent": "shoal-webhooks"}
            outcome = post(letter.url, headers, letter.body, allow_private=self._settings.webhook_allow_private)
            if not outcome.taken:
                log.info("webhook %s did not take event %s: %s", letter.webhook_id, letter.event_id, outcome.detail)
            with self._database.write() as session:
                service.settle(session, letter.id, outcome, utc_now(), lifetime=self._lifetime, chance=random.random())
        except Exception:
            log.exception("sending event %s failed; it is sent again", letter.event_id)
        finally:
            with self._lock:
                self._flying.discard((letter.webhook_id, letter.subject))
            self._ticker.wake()  # there may be more behind it

    def _sweep(self, now: dt.datetime) -> None:
        """Forget what ended long ago; several servers may do so at once."""
        if self._swept_at is not None and (now - self._swept_at).total_seconds() < SWEEP_EVERY_S:
            return
        self._swept_at = now
        with self._database.write() as session:
            repository.forget(session, DeliveryState.DELIVERED, now - KEEP_DELIVERED)
            repository.forget(session, DeliveryState.DEAD, now - KEEP_DEAD)
