"""What one device says, taken in as of many."""

from __future__ import annotations

import datetime as dt

from sqlalchemy.orm import Session

from agent.protocol.messages import Reported
from fleet_server.devices import reports
from fleet_server.devices.reports import ReportOutcome
from fleet_server.rollouts import reports as of_deployments
from fleet_server.settings import Settings


def record_report(session: Session, device_id: str, reported: Reported, now: dt.datetime) -> ReportOutcome:
    """Store what a device says of itself."""
    return reports.record_reports(session, {device_id: reported}, now)[device_id]


def apply_report(session: Session, settings: Settings, device_id: str, reported: Reported, now: dt.datetime) -> None:
    """Store what a device says of itself and of its deployments, and tell it nothing."""
    outcome = record_report(session, device_id, reported, now)
    if outcome.accepted:
        of_deployments.apply_reports(session, settings, [(outcome.device, reported)], now)
