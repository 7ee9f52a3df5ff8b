"""What `shoal top` shows of a fleet: read from the REST API, and put together. It knows no terminal."""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from fleet_server.cli.output import Json
from fleet_server.sdk import Client

MOST_DEVICES = 1000


@dataclass(frozen=True)
class DeviceLine:
    """One device.

    Attributes:
        id: its id.
        profile: its name; empty for none.
        online: whether it is connected.
        serves: what answers requests.
        per_s: requests a second, over the window.
        errors: of its requests, over the window.
        p95_ms: of its slowest model; None without requests.
        trouble: what is wrong, in a few words; empty when nothing is known to be.
    """

    id: str
    profile: str
    online: bool
    serves: str
    per_s: float
    errors: int
    p95_ms: float | None
    trouble: str


@dataclass(frozen=True)
class VersionLine:
    """What one version did on all devices, over the window."""

    name: str
    devices: int
    requests: int
    errors: int
    p50_ms: float | None
    p95_ms: float | None


@dataclass(frozen=True)
class FleetPicture:
    """A fleet at one moment.

    Attributes:
        devices: those in trouble first.
        versions: by name.
        rollouts: that go on, a sentence each.
        more: whether there are more devices than are shown.
        window_s: how long a time figures are of.
        at: when it was read.
    """

    devices: tuple[DeviceLine, ...] = ()
    versions: tuple[VersionLine, ...] = ()
    rollouts: tuple[str, ...] = ()
    more: bool = False
    window_s: float = 60.0
    at: dt.datetime = field(default_factory=lambda: dt.datetime.now(dt.UTC))

    @property
    def summary(self) -> str:
        """The whole fleet in a line."""
        online = sum(one.online for one in self.devices)
        trouble = sum(bool(one.trouble) for one in self.devices)
        per_s, errors = sum(one.per_s for one in self.devices), sum(one.errors for one in self.devices)
        count = f"{len(self.devices)}{'+' if self.more else ''}"
        return f"{count} devices, {online} online, {trouble} in trouble; {per_s:.1f} requests/s, {errors} errors"


def read_fleet(
    api: Client, *, query: str | None, window_s: float, now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)
) -> FleetPicture:
    """Read a fleet.

    Args:
        api: the server.
        query: only devices it holds for, in RSQL; all where absent.
        window_s: how much telemetry is summed up, in seconds.
        now: the time.

    Raises:
        ApiError: when the server refuses, or is not there.
    """
    at = now()
    since = (at - dt.timedelta(seconds=window_s)).isoformat()
    found = list(islice(api.items("/devices", query=query), MOST_DEVICES + 1))
    did: dict[str, list[Json]] = defaultdict(list)
    for row in api.items("/telemetry/models", since=since, by="device"):
        did[row["device_id"]].append(row)
    lines = [_device(one, did[one["id"]], window_s) for one in found[:MOST_DEVICES]]
    spread: Counter[tuple[str, str]] = Counter()
    for one in found[:MOST_DEVICES]:
        for serving in one["serving"]:
            spread[serving["model"], serving["version"]] += 1
    versions = [
        VersionLine(
            f"{row['model']}@{row['version']}",
            spread[row["model"], row["version"]],
            row["requests"],
            row["errors"],
            row["latency_p50_ms"],
            row["latency_p95_ms"],
        )
        for row in api.items("/telemetry/models", since=since, by="version")
    ]
    going = api.items("/rollouts", state="running")
    return FleetPicture(
        tuple(sorted(lines, key=lambda one: (not one.trouble, one.id))),
        tuple(versions),
        tuple(f"{one['name'] or one['id']}: stage {one['stage'] + 1} of {one['stages']}" for one in islice(going, 5)),
        len(found) > MOST_DEVICES,
        window_s,
        at,
    )


def _device(device: Json, did: list[Json], window_s: float) -> DeviceLine:
    times = [row["latency_p95_ms"] for row in did if row["latency_p95_ms"] is not None]
    problems = [one["code"] for one in device["problems"] if one["ongoing"]]
    waiting = [one["waiting"]["reason"] for one in device["waiting"]]
    trouble = [*(() if device["online"] else ("offline",)), *problems]
    return DeviceLine(
        device["id"],
        device["profile"] or "",
        device["online"],
        ", ".join(f"{one['model']}@{one['version']}" for one in device["serving"]),
        sum(row["requests"] for row in did) / window_s,
        sum(row["errors"] for row in did),
        max(times, default=None),
        ", ".join(trouble) or (f"waits: {waiting[0]}" if waiting else ""),
    )
