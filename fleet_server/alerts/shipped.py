"""Rules and the route that every fleet gets. Once it has them they are its own: changed and deleted like any other."""

from __future__ import annotations

from sqlalchemy.orm import Session

from fleet_server.alerts import repository
from fleet_server.alerts.schemas import RouteKind, RouteSpec, RuleSpec
from fleet_server.domain.alerting import Metric, Severity
from fleet_server.models import AlertRoute, AlertRule

SHIPPED = 1  # grows with what is added below, so that fleets get it once
RULES: dict[str, RuleSpec] = {
    "offline": RuleSpec(
        metric=Metric.OFFLINE, for_s=300, severity=Severity.WARNING,
        description="The device is not connected, or says nothing: look at its power, its link, and the broker.",
    ),
    "self-rollback": RuleSpec(
        metric=Metric.ROLLED_BACK, severity=Severity.WARNING,
        description="The device took a new version back by itself: its deployment says why (`shoal rollout show`).",
    ),
    "fell-back": RuleSpec(
        metric=Metric.FELL_BACK, for_s=60, severity=Severity.WARNING,
        description="Another execution provider runs the model than its profile wants first, most likely a slower one.",
    ),
    "drift": RuleSpec(
        metric=Metric.INPUT_DRIFT, threshold=0.25, clear=0.2, severity=Severity.WARNING,
        description="What the model is asked on the device differs from what it was asked when it began there.",
    ),
    "disk-short": RuleSpec(
        metric=Metric.DISK_FREE_MB, threshold=500, clear=700, for_s=300, severity=Severity.WARNING,
        description="The disk of the agent's state folder is nearly full: new versions will not fit.",
    ),
    "certificate-expires": RuleSpec(
        metric=Metric.CERTIFICATE_PERCENT, threshold=15, severity=Severity.CRITICAL,
        description="The device ought to have renewed its certificate by now; without, it will not connect any more.",
    ),
    "rollout-stuck": RuleSpec(
        metric=Metric.ROLLOUT_STUCK_S, threshold=3600, severity=Severity.WARNING,
        description="Devices were sent a version and say nothing of it: see `shoal rollout explain`.",
    ),
}  # fmt: skip
ROUTES: dict[str, RouteSpec] = {"webhooks": RouteSpec(kind=RouteKind.WEBHOOK)}


def ship(session: Session, fleet_id: str) -> None:
    """Give a fleet what it did not get; what it has of the same name stays."""
    fleet = repository.hold_fleet(session, fleet_id)
    if fleet is None or fleet.alert_defaults >= SHIPPED:
        return
    fleet.alert_defaults = SHIPPED
    for name, spec in RULES.items():
        if repository.named(session, AlertRule, fleet_id, name) is None:
            kept = spec.model_dump(mode="json")
            session.add(AlertRule(fleet_id=fleet_id, name=name, spec=kept, shipped=True, created_by="shoal"))
    for name, route in ROUTES.items():
        if repository.named(session, AlertRoute, fleet_id, name) is None:
            kept = route.model_dump(mode="json")
            session.add(AlertRoute(fleet_id=fleet_id, name=name, spec=kept, shipped=True, created_by="shoal"))
