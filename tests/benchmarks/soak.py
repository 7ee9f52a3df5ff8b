"""`make bench-soak`: whether a server's memory stays where it is while telemetry comes at a steady rate (an hour).

A server with its own Mosquitto, on SQLite or PostgreSQL, and simulated devices in a process of their own. What the
server has of memory by itself is read every few seconds: pages of libraries are left out, for how many share them
changes with what else runs. The first third is a start: caches fill, the allocator finds its size. Through the rest a
straight line is laid, which must not rise by more than a few percent in an hour. Every sample that a device was told
to forget must be stored.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
from sqlalchemy import func, select

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import Database
from fleet_server.devices import shipped
from fleet_server.models import HostWindowRow
from tests.benchmarks.common import Checks, cpu_s, own_mb
from tests.databases import postgresql
from tests.fabricated import fabricate
from tests.fleet import BIN, LocalFleet, wait_until

PROFILE = "raspberry-pi-5"
GROWTH_PERCENT_H = 3.0
START = 1 / 3  # of the time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long; default an hour")
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds of a telemetry window; default 5")
    parser.add_argument("--database", choices=["SQLite", "PostgreSQL"], default="PostgreSQL")
    given = parser.parse_args()
    checks = Checks("soak")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-soak-")))
        url = f"sqlite:///{folder / 'shoal.db'}"
        if given.database == "PostgreSQL":
            url = stack.enter_context(postgresql())
        fleet = LocalFleet(folder, forked=False)
        stack.callback(fleet.stop)
        fleet.start_server(
            SHOAL_DATABASE_URL=url,
            SHOAL_TELEMETRY_INTERVAL_S=str(given.interval),
            SHOAL_CONVERSION_WORKERS="0",
            SHOAL_BROKER_TLS="false",
            SHOAL_DELTAS="false",
            SHOAL_ENGINE_TICK_S="1",
            SHOAL_LOG_LEVEL="WARNING",
        )
        soak(checks, fleet, url, folder, given)
    checks.print()


def soak(checks: Checks, fleet: LocalFleet, url: str, folder: Path, given: argparse.Namespace) -> None:
    fleet.api.post("/profiles", json=shipped.load(PROFILE)).raise_for_status()
    database = Database(url)
    fabricate(database, ArtifactStore.open(None, folder=folder / "server" / "artifacts"), folder, "m", "1", size=10_000)
    command = [str(BIN / "shoal"), "simulate", f"--broker=mqtt://127.0.0.1:{fleet.broker_port}", "--output=json",
               f"--devices={given.devices}", f"--profile-mix={PROFILE}", f"--interval={given.interval}"]  # fmt: skip
    log = (folder / "devices.log").open("w")
    devices = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        page = {"profile": PROFILE, "online": "true", "limit": 1}
        wait_until("devices", lambda: fleet.api.get("/devices", params=page).json()["items"], 120)
        time.sleep(given.devices / 100)
        body = {"version": "m@1", "target": {"all": True}, "allow_unproven": True,
                "strategy": {"stages": [{"percent": 100}]}}  # fmt: skip
        rollout = fleet.api.post("/rollouts", json=body).raise_for_status().json()["id"]
        wait_until("the version", lambda: fleet.api.get(f"/rollouts/{rollout}").json()["state"] == "succeeded", 600)
        times, sizes, used = watch(fleet.processes["server"].pid, given.seconds)
        devices.send_signal(signal.SIGINT)
        ended = json.loads(devices.communicate(timeout=120)[0])
    finally:
        devices.kill()
        devices.wait()
    with database.read() as session:
        stored = session.scalar(select(func.count()).select_from(HostWindowRow)) or 0
    database.dispose()
    later = times >= times[-1] * START
    slope, _ = np.polyfit(times[later], sizes[later], 1)
    checks.report("seconds", float(times[-1]))
    checks.report("samples a second", given.devices / given.interval)
    checks.report("server's memory when telemetry began, MB", float(sizes[0]))
    checks.report("server's memory, median of the rest, MB", float(np.median(sizes[later])))
    checks.report("server's memory at the end, MB", float(sizes[-1]))
    checks.report("server's memory, rise of the rest, MB an hour", float(slope * 3600))
    rise = float(100 * slope * 3600 / np.median(sizes[later]))
    checks.at_most("server's memory, rise of the rest, percent an hour", rise, GROWTH_PERCENT_H)
    checks.report("processors the server kept busy", used)
    checks.at_most("acknowledged samples that are not stored", max(0, ended["acknowledged"] - stored), 0)
    checks.at_most("samples stored twice", max(0, stored - ended["windows"]), 0)


def watch(pid: int, seconds: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Times in seconds, memory in MB, and how many processors were busy."""
    began, used, found = time.monotonic(), cpu_s(pid), []
    pause = max(1.0, seconds / 400)
    while (now := time.monotonic() - began) < seconds:
        found.append((now, own_mb(pid)))
        if len(found) % 20 == 0:
            print(f"     {now:.0f} s: {found[-1][1]:.1f} MB", file=sys.stderr, flush=True)
        time.sleep(pause)
    times, sizes = np.array(found).T
    return times, sizes, (cpu_s(pid) - used) / (time.monotonic() - began)


if __name__ == "__main__":
    main()
