"""Whether rollouts stop what is bad and let through what is good: simulated devices on a real server and broker.

Devices are the simulator's, in this process; the server is one of its own with its broker. A version that is good goes
to all; one that is slower, one that crashes on a tenth of the devices, one that is less sure of its answers and one
that is slower on one profile alone must each be taken back by their own rule, having touched few devices. Then good
ones, one after the other, of which at most one in twenty may be stopped. What devices run is what they report.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import Database
from fleet_server.devices import shipped
from fleet_server.simulator.behaviours import read
from fleet_server.simulator.population import populate
from fleet_server.simulator.runner import Simulation
from tests.benchmarks.common import Checks, cpu_s
from tests.fabricated import fabricate
from tests.fleet import LocalFleet, wait_until

Json = dict[str, Any]
GOOD = 20
BEHAVIOURS = """
classes:
  - name: pi
    share: 60
    profile: raspberry-pi-5
    tags: {{site: "plant{{1..7}}"}}
    requests: {{per_s: {per_s}, swing: 0.3}}
    latency: {{median_ms: 12, sigma: 0.35, device_sigma: 0.25, drift: 0.1, drift_s: 120}}
    error_rate: 0.002
    load_s: 0.2
  - name: gateway
    share: 25
    profile: x86-64-vnni
    requests: {{per_s: {per_s}}}
    latency: {{median_ms: 4, sigma: 0.5, device_sigma: 0.2, drift: 0.15, drift_s: 60}}
    load_s: 0.2
  - name: android
    share: 15
    profile: android-class-arm64
    requests: {{per_s: {per_s}}}
    latency: {{median_ms: 30, sigma: 0.3, device_sigma: 0.3}}
    load_s: 0.2
faults:
  - {{share: 0.05, name: flaky, cuts_per_hour: 20, cut_s: 3}}
  - {{share: 0.03, name: lying clock, clock_offset_s: 40}}
  - {{share: 0.03, name: slow, slower: 3}}
effects:
  - {{version: "m@slower", latency_ratio: 1.5}}
  - {{version: "m@crashing", crash: 0.1}}
  - {{version: "m@unsure", confidence: 0.75}}
  - {{version: "m@one-profile", where: {{class: android}}, latency_ratio: 1.6}}
  - {{version: "m@*", latency_ratio: 1.05}}
"""
RULES = [
    {"metric": "failed_percent", "above": 2},
    {"metric": "error_percent", "above": 2, "min_samples": 500},
    {"metric": "latency_p95_ratio", "above": 1.3, "min_samples": 40},
    {"metric": "confidence_drop_points", "above": 8, "min_samples": 40},
]


@dataclass(frozen=True)
class Case:
    """A version, and the rule that is to stop it; none for a good one."""

    version: str
    rule: str = ""
    profile: str = ""


CASES = [
    Case("good"),
    Case("slower", "latency_p95_ratio"),
    Case("crashing", "failed_percent"),
    Case("unsure", "confidence_drop_points"),
    Case("one-profile", "latency_p95_ratio", "android-class-arm64"),
]


class World:
    """The server, as its users reach it."""

    def __init__(self, fleet: LocalFleet, devices: int, watch_s: float) -> None:
        self._api, self._devices, self._watch_s = fleet.api, devices, watch_s

    def get(self, path: str, **parameters: Any) -> Json:
        answer = self._api.get(path, params=parameters).raise_for_status()
        found: Json = answer.json()
        return found

    def every(self, path: str) -> list[Json]:
        found, cursor = [], None
        while True:
            page = self.get(path, limit=500, **({"cursor": cursor} if cursor else {}))
            found += page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return found

    def profiles(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._api.post("/profiles", json=shipped.load(name)).raise_for_status()

    def rollout(self, version: str, *, at_once: bool = False) -> Json:
        """One that has ended, or been taken back."""
        stages = [{"percent": 100}] if at_once else [
            {"percent": 4, "soak_s": self._watch_s},
            {"percent": 12, "soak_s": self._watch_s},
            {"percent": 100, "soak_s": self._watch_s / 2},
        ]  # fmt: skip
        body = {
            "version": f"m@{version}",
            "target": {"all": True},
            "allow_unproven": True,
            # Devices judge by crashes and errors alone here, so that it is the server that finds what is slower.
            "strategy": {
                "stages": stages,
                "stop_when": [] if at_once else RULES,
                "probation": {"latency_p95_ratio": 0},
            },
        }
        made = self._api.post("/rollouts", json=body).raise_for_status().json()

        def ended() -> Json | None:
            found = self.get(f"/rollouts/{made['id']}")
            return found if found["state"] in {"succeeded", "stopped", "reverted", "paused"} else None

        return awaited(f"the rollout of {version}", ended, 600)

    def touched(self, rollout: Json) -> int:
        rows = self.every(f"/rollouts/{rollout['id']}/deployments")
        return len({row["device_id"] for row in rows if row["sent_at"]})

    def running(self) -> dict[str, int]:
        """How many devices say that they serve each version."""
        found: dict[str, int] = {}
        for device in self.every("/devices"):
            name = device["serving"][0]["version"] if len(device["serving"]) == 1 else "none or several"
            found[name] = found.get(name, 0) + 1
        return found


def awaited(what: str, find: Callable[[], Any], timeout_s: float) -> Any:
    until = time.monotonic() + timeout_s
    while (found := find()) is None:
        if time.monotonic() > until:
            raise RuntimeError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="200 devices and two more good versions")
    parser.add_argument("--devices", type=int, help="how many; default 2,000, or 200 with --short")
    parser.add_argument("--seed", type=int, default=1, help="of the simulated devices")
    options = parser.parse_args()
    devices = options.devices or (200 if options.short else 2000)
    goods = 2 if options.short else GOOD
    checks = Checks("rollouts")
    with tempfile.TemporaryDirectory() as name:
        measure(checks, Path(name), devices, goods, options.seed)
    checks.print()


def measure(checks: Checks, folder: Path, devices: int, goods: int, seed: int) -> None:
    interval_s = 1.0 if devices <= 300 else 5.0
    per_s = 40 / interval_s
    behaviours = read(BEHAVIOURS.format(per_s=per_s))
    fleet = LocalFleet(folder)
    try:
        fleet.start_server(
            SHOAL_TELEMETRY_INTERVAL_S=str(interval_s),
            SHOAL_CONVERSION_WORKERS="0",
            SHOAL_BROKER_TLS="false",
            SHOAL_DELTAS="false",
        )
        world = World(fleet, devices, watch_s=12 * interval_s)
        world.profiles(tuple(str(one.profile) for one in behaviours.classes))
        database = Database(f"sqlite:///{folder / 'server' / 'shoal.db'}")
        artifacts = ArtifactStore.open(None, folder=folder / "server" / "artifacts")
        more = [Case(f"good-{number}") for number in range(1, goods + 1)]
        for version in ("first", *(case.version for case in [*CASES, *more])):
            fabricate(database, artifacts, folder, "m", version, size=10_000)
        population = populate(behaviours, devices, seed=seed)
        broker = f"mqtt://127.0.0.1:{fleet.broker_port}"
        with Simulation(broker, population, behaviours.effects, seed=seed):
            wait_until("all devices", lambda: len(world.every("/devices")) == devices, 300)
            judge(checks, world, more, fleet, devices, interval_s)
    finally:
        fleet.stop()


def judge(checks: Checks, world: World, more: list[Case], fleet: LocalFleet, devices: int, interval_s: float) -> None:
    started, used = time.monotonic(), cpu_s(fleet.processes["server"].pid)
    assert world.rollout("first", at_once=True)["state"] == "succeeded"
    before = "first"
    time.sleep(8 * interval_s)  # of a past to compare with
    false_stops = 0
    for case in [*CASES, *more]:
        began = time.monotonic()
        rollout = world.rollout(case.version)
        touched = world.touched(rollout)
        took = time.monotonic() - began
        reason = rollout["verdicts"][-2]["reason"] if len(rollout["verdicts"]) > 1 else ""
        print(f"{case.version}: {rollout['state']} after {took:.0f} s, {touched} touched: {reason}", file=sys.stderr)
        if not case.rule:
            good = rollout["state"] == "succeeded"
            false_stops += not good
            if case in CASES:
                checks.at_least(f"{case.version}: devices that run it", rollout["counts"]["active"], devices * 0.99)
            before = case.version if good else before
            time.sleep(2 * interval_s if good else 0)
            continue
        named = rollout["state"] == "reverted" and reason.startswith(case.rule) and case.profile in reason
        checks.add(f"{case.version}: stopped, and {case.rule} named", None, "named", holds=named)
        checks.at_most(f"{case.version}: percent of the devices touched", 100 * touched / devices, 12)
        back = awaited("reports", lambda old=before: world.running().get(old, 0) >= devices or None, 60)  # type: ignore[misc]
        checks.add(f"{case.version}: every device runs again what it ran", None, "all", holds=bool(back))
        checks.report(f"{case.version}: seconds until everything was taken back", took)
    checks.at_most(f"false stops of {len(more) + 1} good versions", false_stops, 1)
    spent = cpu_s(fleet.processes["server"].pid) - used
    checks.report("CPU share of the server", spent / (time.monotonic() - started))


if __name__ == "__main__":
    main()
