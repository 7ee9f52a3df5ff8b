"""Keeps the broker to who may connect: certificates that are renewed, revocations, and connections that are ended.

What is to be done is rows in the database, so a server that starts again goes on where it was.
"""

from __future__ import annotations

import logging
import ssl
import time

from agent.protocol.topics import client_id
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.enrolment import repository
from fleet_server.gateway.broker import EmbeddedBroker
from fleet_server.gateway.broker_files import BrokerFiles
from fleet_server.gateway.mqtt import end_session
from fleet_server.models import DeviceIdentity
from fleet_server.settings import Settings

log = logging.getLogger(__name__)
RELOAD_S = 1.0  # Mosquitto reads its files in its main loop, at most so much later
TRY_AGAIN_S = 10.0


class Lockout:
    """Does nothing where devices need no certificates, but note that nobody had to be thrown out."""

    def __init__(
        self, settings: Settings, database: Database, files: BrokerFiles, broker: EmbeddedBroker | None
    ) -> None:
        self._url = settings.effective_broker_url
        self._tls = settings.broker_tls
        self._database = database
        self._files = files
        self._broker = broker
        self._not_before: dict[str, float] = {}
        self.context: ssl.SSLContext | None = ssl.create_default_context() if self._url.startswith("mqtts") else None

    def prepare(self) -> None:
        """Write what the broker and the server's link need before they start."""
        if self._tls:
            self._refresh()

    def step(self) -> None:
        """Write what has changed, and end the connections of devices that were locked out."""
        if self._tls and self._refresh() and self._broker is not None:
            self._broker.reload()
            time.sleep(RELOAD_S)
        if not self._database.finds(repository.TO_EVICT):
            return
        with self._database.read() as session:
            due = [(one.device_id, one.fleet_id) for one in repository.to_evict(session)]
        now = time.monotonic()
        for device_id, fleet in due:
            if self._not_before.get(device_id, 0.0) <= now:
                self._evict(device_id, fleet)

    def _refresh(self) -> bool:
        now = utc_now()
        renewed = self._files.write_certificates(now)
        if renewed and self.context is not None:
            self._files.load_client(self.context)
        with self._database.read() as session:
            revoked = repository.revoked_serials(session, now)
        return self._files.write_revocations(revoked, now) or renewed

    def _evict(self, device_id: str, fleet: str) -> None:
        if self._tls and not end_session(self._url, client_id(device_id), self._files.context_as(device_id, fleet)):
            log.error(
                "the connection of device %s, which is locked out, could not be ended; it is tried again", device_id
            )
            self._not_before[device_id] = time.monotonic() + TRY_AGAIN_S
            return
        self._not_before.pop(device_id, None)
        with self._database.write() as session:
            identity = session.get(DeviceIdentity, device_id)
            if identity is not None:
                identity.evict, identity.evicted_at = False, utc_now()
        log.warning("device %s is locked out", device_id)
