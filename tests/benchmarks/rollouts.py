"""Whether rollouts stop what is bad and let through what is good: simulated devices on a real server and broker.

Devices are the simulator's, in this process; the server is one of its own with its broker. Each case is a model of its
own, and all are rolled out at once. A version that is good goes to all; one that is slower, one that crashes on a tenth
of the devices, one that is less sure of its answers and one that is slower on one profile alone must each be taken back
by their own rule, having touched few devices. Of the good ones at most one in twenty may be stopped. What devices run
is what they report.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import httpx

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import Database
from fleet_server.devices import shipped
from fleet_server.simulator.behaviours import read
from fleet_server.simulator.population import populate
from fleet_server.simulator.runner import Simulation
from tests.benchmarks.common import Checks, cpu_s
from tests.fabricated import fabricate
from tests.fleet import LocalFleet

Json = dict[str, Any]
GOOD = 20
WAIT_S = 900.0
WAIT_INTERVALS = 60  # more: what is watched lasts for so many of them
WINDOWS_PER_S = 1000  # that one server on two cores takes beside all else; more devices speak less often
ENDS = {"succeeded", "stopped", "reverted", "paused"}
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
  - {{version: "slower@2", latency_ratio: 1.5}}
  - {{version: "crashing@2", crash: 0.1}}
  - {{version: "unsure@2", confidence: 0.75}}
  - {{version: "one-profile@2", where: {{class: android}}, latency_ratio: 1.6}}
  - {{version: "*@2", latency_ratio: 1.05}}
"""
RULES = [
    {"metric": "failed_percent", "above": 2},
    {"metric": "error_percent", "above": 2, "min_samples": 500},
    {"metric": "latency_p95_ratio", "above": 1.3, "min_samples": 40},
    {"metric": "confidence_drop_points", "above": 8, "min_samples": 40},
]


@dataclass(frozen=True)
class Case:
    """A model whose second version is rolled out, and the rule that is to stop it; none for a good one."""

    model: str
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
        """What the server says; a connection that it ended as it was idle is made anew."""
        for last in (False, False, True):
            try:
                answer = self._api.get(path, params=parameters).raise_for_status()
                break
            except httpx.TransportError:
                if last:
                    raise
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

    def roll_out(self, reference: str, *, at_once: bool = False) -> str:
        """Begin; its id."""
        stages = [{"percent": 100}] if at_once else [
            {"percent": 4, "soak_s": self._watch_s},
            {"percent": 12, "soak_s": self._watch_s},
            {"percent": 100, "soak_s": self._watch_s / 2},
        ]  # fmt: skip
        body = {
            "version": reference,
            "target": {"all": True},
            "allow_unproven": True,
            # Devices judge by crashes and errors alone here, so that it is the server that finds what is slower.
            "strategy": {
                "stages": stages,
                "stop_when": [] if at_once else RULES,
                "probation": {"latency_p95_ratio": 0},
            },
        }
        return str(self._api.post("/rollouts", json=body).raise_for_status().json()["id"])

    def ended(self, rollout_id: str) -> Json | None:
        """A rollout that goes on by itself no more; None before."""
        found = self.get(f"/rollouts/{rollout_id}")
        return found if found["state"] in ENDS else None

    def touched(self, rollout: Json) -> int:
        rows = self.every(f"/rollouts/{rollout['id']}/deployments")
        return len({row["device_id"] for row in rows if row["sent_at"]})

    def running(self) -> Counter[str]:
        """How many devices say that they serve each version."""
        return Counter(
            f"{one['model']}@{one['version']}" for device in self.every("/devices") for one in device["serving"]
        )


def awaited(what: str, find: Callable[[], Any], timeout_s: float) -> Any:
    until = time.monotonic() + timeout_s
    while (found := find()) is None:
        if time.monotonic() > until:
            raise RuntimeError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="200 devices and one more good version")
    parser.add_argument("--devices", type=int, help="how many; default 2,000, or 200 with --short")
    parser.add_argument("--seed", type=int, default=1, help="of the simulated devices")
    options = parser.parse_args()
    devices = options.devices or (200 if options.short else 2000)
    goods = 1 if options.short else GOOD - 1
    checks = Checks("rollouts")
    with tempfile.TemporaryDirectory() as name:
        measure(checks, Path(name), devices, goods, options.seed)
    checks.print()


def measure(checks: Checks, folder: Path, devices: int, goods: int, seed: int) -> None:
    cases = [*CASES, *(Case(f"good-{number}") for number in range(1, goods + 1))]
    interval_s = max(2.0, devices * len(cases) / WINDOWS_PER_S)
    behaviours = read(BEHAVIOURS.format(per_s=60 / interval_s))
    fleet = LocalFleet(folder, forked=False)
    try:
        fleet.start_server(
            SHOAL_TELEMETRY_INTERVAL_S=str(interval_s),
            SHOAL_CONVERSION_WORKERS="0",
            SHOAL_BROKER_TLS="false",
            SHOAL_DELTAS="false",
        )
        world = World(fleet, devices, watch_s=8 * interval_s)
        world.profiles(tuple(str(one.profile) for one in behaviours.classes))
        database = Database(f"sqlite:///{folder / 'server' / 'shoal.db'}")
        artifacts = ArtifactStore.open(None, folder=folder / "server" / "artifacts")
        for case in cases:
            for version in "12":
                fabricate(database, artifacts, folder, case.model, version, size=10_000)
        population = populate(behaviours, devices, seed=seed)
        broker = f"mqtt://127.0.0.1:{fleet.broker_port}"
        with Simulation(broker, population, behaviours.effects, seed=seed):
            awaited("all devices", lambda: len(world.every("/devices")) == devices or None, 300)
            judge(checks, world, cases, fleet, devices, interval_s)
    finally:
        fleet.stop()


def judge(checks: Checks, world: World, cases: list[Case], fleet: LocalFleet, devices: int, interval_s: float) -> None:
    started, used = time.monotonic(), cpu_s(fleet.processes["server"].pid)
    wait_s = WAIT_S + WAIT_INTERVALS * interval_s
    firsts = [world.roll_out(f"{case.model}@1", at_once=True) for case in cases]
    for one in firsts:
        assert awaited("the first versions", lambda one=one: world.ended(one), wait_s)["state"] == "succeeded"  # type: ignore[misc]
    time.sleep(8 * interval_s)  # of a past to compare with
    rollouts = {case: world.roll_out(f"{case.model}@2") for case in cases}
    false_stops = 0
    for case, rollout_id in rollouts.items():
        rollout = awaited(f"the rollout of {case.model}", lambda one=rollout_id: world.ended(one), wait_s)  # type: ignore[misc]
        touched = world.touched(rollout)
        reasons = [one["reason"] for one in rollout["verdicts"] if one["decision"] in {"revert", "pause", "stop"}]
        print(f"{case.model}: {rollout['state']}, {touched} touched {reasons}", file=sys.stderr, flush=True)
        if not case.rule:
            false_stops += rollout["state"] != "succeeded"
            continue
        named = rollout["state"] == "reverted" and reasons[0].startswith(case.rule) and case.profile in reasons[0]
        checks.add(f"{case.model}: stopped, and {case.rule} named", None, "named", holds=named)
        checks.at_most(f"{case.model}: percent of the devices touched", 100 * touched / devices, 12)
        was = f"{case.model}@1"
        back = awaited("reports", lambda was=was: world.running()[was] == devices or None, wait_s)  # type: ignore[misc]
        checks.add(f"{case.model}: every device runs again what it ran", None, "all", holds=bool(back))
    good = len([case for case in cases if not case.rule])
    checks.at_most(f"false stops of {good} good versions", false_stops, 1)
    running = world.running()
    share = min(running[f"{case.model}@2"] for case in cases if not case.rule) / devices
    checks.at_least("good versions: share of the devices that run them, the least", share, 0 if false_stops else 0.99)
    checks.report("seconds for all of it", time.monotonic() - started)
    spent = cpu_s(fleet.processes["server"].pid) - used
    checks.report("processors the server kept busy", spent / (time.monotonic() - started))


if __name__ == "__main__":
    main()
