"""Counts devices that are out of order, writes it down now and then, and raises an alert for each once an hour."""

from __future__ import annotations

import datetime as dt
import logging
import threading
from collections import Counter

from sqlalchemy.orm import Session

from fleet_server import audit
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.models import Device, DeviceConduct, DeviceIdentity

log = logging.getLogger(__name__)
ALERT_EVERY = dt.timedelta(hours=1)
DEVICES = 10_000
DETAIL_CHARS = 300
COUNT_MOST = 1 << 62


class Conduct:
    """Noting is cheap and may be done by any thread; `write` puts it into the database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._malformed: Counter[str] = Counter()
        self._flooded: Counter[str] = Counter()
        self._details: dict[str, str] = {}

    def malformed(self, device_id: str, detail: str) -> None:
        """A message of a device could not be read, or was not its to send."""
        self._note(self._malformed, device_id, detail)

    def flooded(self, device_id: str) -> None:
        """A message of a device was beyond its share, and dropped."""
        self._note(self._flooded, device_id, "it sends more than its share; messages were dropped")

    def write(self) -> None:
        """Add what was noted to the rows of the devices; those that the fleet does not know are left out."""
        with self._lock:
            malformed, flooded, details = self._malformed, self._flooded, self._details
            self._malformed, self._flooded, self._details = Counter(), Counter(), {}
        if not details:
            return
        with self._database.write() as session:
            for device_id, detail in details.items():
                _add(session, device_id, malformed[device_id], flooded[device_id], detail)

    def _note(self, counts: Counter[str], device_id: str, detail: str) -> None:
        with self._lock:
            if device_id in self._details or len(self._details) < DEVICES:
                counts[device_id] += 1
                self._details[device_id] = detail[:DETAIL_CHARS]


def _add(session: Session, device_id: str, malformed: int, flooded: int, detail: str) -> None:
    known = session.get(Device, device_id) or session.get(DeviceIdentity, device_id)
    if known is None:
        return
    now = utc_now()
    row = session.get(DeviceConduct, device_id)
    if row is None:
        row = DeviceConduct(device_id=device_id, fleet_id=known.fleet_id, malformed=0, flooded=0)
        session.add(row)
    row.malformed = min(row.malformed + malformed, COUNT_MOST)
    row.flooded = min(row.flooded + flooded, COUNT_MOST)
    row.last_at, row.last_detail = now, detail.replace("\0", "")
    if row.alerted_at is None or now - row.alerted_at > ALERT_EVERY:
        row.alerted_at = now
        ids = {"device": device_id, "fleet": known.fleet_id}
        log.warning("device %s is out of order: %s", device_id, detail, extra=ids)
        audit.record(
            session,
            fleet_id=known.fleet_id,
            actor="server",
            action="device.misbehaves",
            subject=f"device/{device_id}",
            detail={"malformed": row.malformed, "flooded": row.flooded, "last": row.last_detail},
        )
