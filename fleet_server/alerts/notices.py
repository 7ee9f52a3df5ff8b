"""What is told of a rule's alerts: one notice for all of them, the same by every way. Pure."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fleet_server.models import Alert

LISTED = 50  # alerts that a notice names; of others it says how many there are
State = Literal["firing", "resolved", "test"]


@dataclass(frozen=True)
class Notice:
    """One notice.

    Attributes:
        fleet: where.
        state: what became of its alerts.
        rule: its name.
        severity: of the rule.
        metric: of the rule.
        description: of the rule.
        count: alerts that it is about.
        firing: alerts of the rule that fire now and are not silenced.
        repeated: whether the route was told of them before.
        alerts: the first `LISTED` of them.
    """

    fleet: str
    state: State
    rule: str
    severity: str
    metric: str
    description: str = ""
    count: int = 0
    firing: int = 0
    repeated: bool = False
    alerts: Sequence[Mapping[str, Any]] = ()

    @property
    def data(self) -> dict[str, Any]:
        """As JSON: the data of an event, or the whole of a message."""
        return {
            "fleet": self.fleet,
            "state": self.state,
            "rule": self.rule,
            "severity": self.severity,
            "metric": self.metric,
            "description": self.description,
            "count": self.count,
            "firing": self.firing,
            "repeated": self.repeated,
            "alerts": list(self.alerts),
            "more": self.count - len(self.alerts),
        }

    @property
    def message(self) -> bytes:
        """As an MQTT message."""
        return json.dumps(self.data, separators=(",", ":"), default=str, allow_nan=False).encode()

    @property
    def title(self) -> str:
        """The subject of an e-mail."""
        if self.state == "test":
            return f"[shoal {self.fleet}] a test of alerts"
        again = "still " if self.repeated else ""
        return f"[shoal {self.fleet}] {self.count} {again}{self.state}: {self.rule} ({self.severity})"

    @property
    def text(self) -> str:
        """The body of an e-mail."""
        if self.state == "test":
            return f"This is a test of alerts of the fleet {self.fleet}: they come by this way.\n"
        lines = [f"{self.title.partition('] ')[2]}", *([self.description] if self.description else []), ""]
        lines += [f"- {one['subject']}: {one['detail']}{_when(one)}" for one in self.alerts]
        if self.count > len(self.alerts):
            lines.append(f"… and {self.count - len(self.alerts)} more: shoal alert ls --rule {self.rule}")
        lines += ["", f"{self.firing} of the rule fire now."]
        return "\n".join(lines) + "\n"


def listed(alerts: Sequence[Alert]) -> list[dict[str, Any]]:
    """Alerts as a notice names them."""
    return [
        {
            "id": one.id,
            "subject": one.subject,
            "device_id": one.device_id,
            "model": one.model,
            "rollout_id": one.rollout_id,
            "value": one.value,
            "detail": one.detail,
            "since": _time(one.since),
            "firing_at": _time(one.firing_at),
            "resolved_at": _time(one.resolved_at),
            "resolution": one.resolution,
        }
        for one in alerts
    ]


def _time(at: dt.datetime | None) -> str | None:
    return None if at is None else at.isoformat().replace("+00:00", "Z")


def _when(one: Mapping[str, Any]) -> str:
    if one["resolved_at"]:
        return f", resolved at {one['resolved_at'][:19].replace('T', ' ')} UTC ({one['resolution']})"
    return f", since {one['since'][:19].replace('T', ' ')} UTC"
