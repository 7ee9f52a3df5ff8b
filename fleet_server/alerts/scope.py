"""Where a rule looks: its fleet, its devices, and since when."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import Session

from fleet_server.alerts.schemas import RuleSpec
from fleet_server.devices.selection import condition, read_query
from fleet_server.models import Device, DeviceIdentity

Rows = Select[*tuple[Any, ...]]  # a query for rows of several columns


@dataclass(frozen=True)
class Scope:
    """One look.

    Attributes:
        session: to read with.
        fleet_id: of the rule.
        spec: the rule.
        interval_s: of devices' telemetry, in seconds.
        now: the time.
    """

    session: Session
    fleet_id: str
    spec: RuleSpec
    interval_s: float
    now: dt.datetime

    def ago(self, seconds: float) -> dt.datetime:
        """That long before now."""
        return self.now - dt.timedelta(seconds=seconds)

    def devices(self) -> list[ColumnElement[bool]]:
        """What must hold of a row of `devices`: known, not forgotten, not locked out, and as the rule's query says."""
        locked_out = select(DeviceIdentity.device_id).where(
            DeviceIdentity.fleet_id == self.fleet_id, DeviceIdentity.revoked_at.is_not(None)
        )
        found = [Device.fleet_id == self.fleet_id, Device.forgotten_at.is_(None), Device.id.not_in(locked_out)]
        if self.spec.query is not None:
            found.append(condition(read_query(self.spec.query, "query"), self.fleet_id))
        return found

    def ids(self) -> Select[str]:
        """Ids of those devices."""
        return select(Device.id).where(*self.devices())
