"""What people and dashboards ask a server, as paths of its API: every list, filter and page that a large fleet has."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from urllib.parse import urlencode

from fleet_server.paging import encode_cursor
from tests.big_fleet import BigFleet


@dataclass(frozen=True)
class Question:
    """One GET.

    Attributes:
        name: for people.
        path: below `/api/v1`.
        goal: whether it is a list or a filter, which must be quick however large the fleet.
    """

    name: str
    path: str
    goal: bool = True


def questions(fleet: BigFleet) -> list[Question]:
    """Every question, of a fleet that `big_fleet` wrote."""
    device, version = fleet.device_id, f"{fleet.model}@{fleet.version}"
    middle = encode_cursor("id", device, device)

    def of(name: str, path: str, *, goal: bool = True, **parameters: object) -> Question:
        return Question(name, f"{path}?{urlencode(parameters)}" if parameters else path, goal)

    def asked(query: str) -> Question:
        return of(f"devices where {query}", "/devices", query=query)

    return [
        of("devices", "/devices"),
        of("devices, a page in the middle", "/devices", cursor=middle),
        *(of(f"devices by {sort}", "/devices", sort=sort) for sort in ("-created_at", "-last_seen_at", "profile")),
        of("devices of a profile", "/devices", profile=fleet.profile),
        of("devices that are offline", "/devices", online="false"),
        of("devices that are online", "/devices", online="true"),
        asked("site==plant7;accelerator==cuda"),
        asked("memory_mb>=2048;cpu_feature==avx2,arch==aarch64"),
        asked("id==cam-0001*"),
        asked(f"version!={version}"),
        asked("fell_back==*"),
        asked("online==false;running.provider==cpu"),
        asked("camera==c17"),
        of("device", f"/devices/{device}"),
        of("device: its deployments", "/deployments", device=device),
        of("device: its telemetry", "/telemetry/models", device=device),
        of("device: its own state", "/telemetry/hosts", device=device),
        of("device: what was done to it", "/audit-events", subject=f"device/{device}"),
        of("device: its identity", f"/devices/{device}/identity"),
        of("rollouts", "/rollouts"),
        of("rollouts that are running", "/rollouts", state="running"),
        of("rollouts of a model", "/rollouts", model=fleet.model),
        of("rollouts of a version", "/rollouts", version=version),
        of("rollout", f"/rollouts/{fleet.rollout_id}", goal=False),
        of("rollout: explained", f"/rollouts/{fleet.rollout_id}/explain", goal=False),
        of("rollout: its deployments", f"/rollouts/{fleet.rollout_id}/deployments"),
        of("rollout: those that failed", f"/rollouts/{fleet.rollout_id}/deployments", phase="failed"),
        of("deployments", "/deployments"),
        of("deployments that failed", "/deployments", phase="failed"),
        of("deployments of a model", "/deployments", model=fleet.model),
        of("deployments by phase", "/deployments", sort="phase"),
        of("telemetry of a version, a day by hours", f"/models/{fleet.model}/versions/{fleet.version}/telemetry",
           goal=False, step="1h"),
        of("telemetry of a version on a device, a day by hours",
           f"/models/{fleet.model}/versions/{fleet.version}/telemetry", step="1h", device=device),
        of("state of devices, newest first", "/telemetry/hosts"),
        of("audit log", "/audit-events"),
        of("audit log of a person", "/audit-events", actor="user/7"),
        of("audit log of an action", "/audit-events", action="rollout.create"),
        of("audit log of a kind of action", "/audit-events", action="rollout.*"),
        of("audit log of an hour", "/audit-events", since=(fleet.now - dt.timedelta(days=30)).isoformat(),
           until=(fleet.now - dt.timedelta(days=30, hours=-1)).isoformat()),
        of("models", "/models"),
        of("versions of a model", f"/models/{fleet.model}/versions"),
        of("variants", "/variants"),
        of("variants that are being built", "/variants", state="building"),
        of("profiles", "/profiles"),
        of("profile, with its devices counted", f"/profiles/{fleet.profile}"),
        of("gate runs", "/gate-runs"),
        of("shard plans", "/shard-plans"),
        of("requests to enrol", "/enrolments"),
        of("requests to enrol that wait", "/enrolments", state="pending"),
        of("identities", "/device-identities"),
        of("identities that were revoked", "/device-identities", revoked="true"),
        of("samples that have come", "/sample-sets"),
        of("samples of a device", "/sample-sets", device="cam-000001"),
        of("deliveries of webhooks", "/webhook-deliveries"),
        of("deliveries of webhooks that nobody took", "/webhook-deliveries", state="dead"),
        of("overview", "/overview"),
        of("history of a day", "/overview/history"),
        of("history of a month by six hours", "/overview/history", step="6h",
           since=(fleet.now - dt.timedelta(days=30)).isoformat()),
    ]  # fmt: skip
