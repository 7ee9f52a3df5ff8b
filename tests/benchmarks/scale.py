"""`make bench-scale`: what a device costs the server, its broker and its database, from a thousand devices up.

For each size a server with its own Mosquitto over an empty PostgreSQL, and simulated devices in as many processes as
they need, with and without mutual TLS. Four things happen one after the other: everybody connects at once and
registers, a first version goes to all, telemetry comes for a while, a second version goes to all. Processor time,
memory, bytes at the broker's sockets and rows are read around each. A straight line is laid through the sizes: its
slope is the cost of a device, how far the sizes are off it is told, and where it leads with 100,000 and 1,000,000
devices. Nothing may be lost: every device must end on the second version, and every acknowledged sample must be
stored, once.

Processes of the devices themselves share the processors with the rest and are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sqlalchemy import text

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import Database
from fleet_server.devices import shipped
from tests.benchmarks.common import Checks, children, pss_mb
from tests.benchmarks.scale_lines import Measured, Quantity, asked_for, less_telemetry, lines, markdown, plot
from tests.databases import postgresql
from tests.fabricated import fabricate
from tests.fleet import BIN, LocalFleet

PROFILES = ("raspberry-pi-5", "x86-64-vnni")
OF_A_PROCESS = 3000  # simulated devices
STORM_PER_S = 2000.0
IDLE_S = 10.0
WAIT_S = 1800.0  # where the machine has other work
TICKS_S = os.sysconf("SC_CLK_TCK")
ROWS = ("devices", "device_attributes", "deployments", "telemetry_batches", "model_windows", "host_windows")
MODEL = "m"
FIGURES = "scale.json"


@dataclass(frozen=True)
class Reading:
    """What has been used until now: seconds of processors, and bytes at the broker's sockets."""

    at: float
    server_s: float
    broker_s: float
    database_s: float


class World:
    """A server, its broker and its database."""

    def __init__(self, fleet: LocalFleet, database: Database, folder: Path) -> None:
        self.fleet, self.database, self.folder = fleet, database, folder
        self.server = fleet.processes["server"].pid
        (self.broker,) = [one for one in children(self.server) if _name(one) == "mosquitto"]
        self.postmaster = int(_stat(int(self.ask("SELECT pg_backend_pid()")))[1])

    def ask(self, query: str) -> Any:
        """The one value of a query."""
        with self.database.read() as session:
            return session.scalar(text(query))

    def read(self) -> Reading:
        backends = sum(_used_s(pid) for pid in children(self.postmaster))
        return Reading(
            time.monotonic(), _used_s(self.server), _used_s(self.broker), _used_s(self.postmaster) + backends
        )

    def memory_mb(self) -> dict[str, float]:
        backends = [self.postmaster, *children(self.postmaster)]
        return {
            "server": pss_mb(self.server),
            "broker": pss_mb(self.broker),
            "database": sum(pss_mb(one) for one in backends),
        }

    def bytes(self) -> tuple[int, int]:
        """From and to devices at the broker's sockets, with what TLS adds; those of the server are left out."""
        port = self.fleet.broker_port
        listed = subprocess.run(
            ["ss", "-tinHpO", "state", "established", "sport", "=", f":{port}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        own = subprocess.run(
            ["ss", "-tnHpO", "state", "established", "dport", "=", f":{port}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        ours = {one.split()[2] for one in own.splitlines() if f"pid={self.server}," in one}
        received = sent = 0
        for line in listed.splitlines():
            if line.split()[3] in ours:
                continue
            received += _number(r"bytes_received:(\d+)", line)
            sent += _number(r"bytes_sent:(\d+)", line)
        return received, sent

    def rows(self) -> int:
        return sum(int(self.ask(f"SELECT count(*) FROM {name}")) for name in ROWS)

    def windows(self) -> int:
        """Of telemetry, stored so far."""
        return int(self.ask("SELECT count(*) FROM host_windows"))

    def roll_out(self, version: str) -> str:
        """Send a version to every device; its rollout's id."""
        body = {
            "version": f"{MODEL}@{version}",
            "target": {"all": True},
            "allow_unproven": True,
            "strategy": {"stages": [{"percent": 100}], "probation": {"latency_p95_ratio": 0}},
        }
        return str(self.fleet.api.post("/rollouts", json=body).raise_for_status().json()["id"])

    def state(self, rollout_id: str) -> str:
        return str(self.fleet.api.get(f"/rollouts/{rollout_id}").raise_for_status().json()["state"])


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _stat(pid: int) -> list[str]:
    """Fields of `/proc/PID/stat` after the name: 0 is the state, 1 the parent."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _used_s(pid: int) -> float:
    """Processor time of a process, and of its children that have ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return sum(map(int, _stat(pid)[11:15])) / TICKS_S
    return 0.0


def _number(pattern: str, line: str) -> int:
    found = re.search(pattern, line)
    return int(found[1]) if found else 0


def awaited(what: str, holds: Callable[[], bool], pause_s: float = 0.5) -> float:
    """Wait until it holds; the seconds that took."""
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > WAIT_S:
            raise RuntimeError(f"waited {WAIT_S:.0f} s for {what}")
        time.sleep(pause_s)
    return time.monotonic() - started


@contextmanager
def world(folder: Path, interval_s: float, *, tls: bool) -> Iterator[World]:
    with postgresql() as url:
        fleet = LocalFleet(folder, forked=False)
        try:
            fleet.start_server(
                SHOAL_DATABASE_URL=url,
                SHOAL_TELEMETRY_INTERVAL_S=str(interval_s),
                SHOAL_CONVERSION_WORKERS="0",
                SHOAL_BROKER_TLS=str(tls).lower(),
                SHOAL_DELTAS="false",
                SHOAL_ENGINE_TICK_S="1",
                SHOAL_LOG_LEVEL="WARNING",
            )
            for name in PROFILES:
                fleet.api.post("/profiles", json=shipped.load(name)).raise_for_status()
            database = Database(url)
            artifacts = ArtifactStore.open(None, folder=folder / "server" / "artifacts")
            for version in "12":
                fabricate(database, artifacts, folder, MODEL, version, size=10_000)
            try:
                yield World(fleet, database, folder)
            finally:
                database.dispose()
        finally:
            fleet.stop()


class Devices:
    """Processes of simulated devices."""

    def __init__(self, at: World, count: int, interval_s: float, *, tls: bool) -> None:
        self.count = count
        self._at, self._tls, self._interval_s = at, tls, interval_s
        self._processes: list[subprocess.Popen[str]] = []

    def _command(self, first: int, count: int) -> list[str]:
        scheme = "mqtts" if self._tls else "mqtt"
        options = {
            "broker": f"{scheme}://127.0.0.1:{self._at.fleet.broker_port}",
            "devices": count,
            "first": first,
            "profile-mix": f"{PROFILES[0]}=3,{PROFILES[1]}=1",
            "interval": self._interval_s,
            "connect-rate": STORM_PER_S,
            "output": "json",
        }
        if self._tls:
            options |= {"identities": self._at.folder / "identities"}
        return [str(BIN / "shoal"), "simulate", *(f"--{name}={value}" for name, value in options.items())]

    def enrol(self) -> None:
        """Give every device its certificate, by a process that ends when it is done."""
        token = self._at.fleet.api.post("/enrolment-tokens", json={"uses": self.count}).raise_for_status().json()
        command = [*self._command(0, self.count), f"--enroll={token['token']}", f"--server={self._at.fleet.url}"]
        done = subprocess.run([*command, "--duration=0"], check=False, capture_output=True, text=True)
        held = len(list((self._at.folder / "identities").glob("*/identity/identity.json")))
        if held != self.count:
            raise RuntimeError(f"{held} of {self.count} devices have certificates: {done.stderr[-2000:]}")

    def start(self) -> None:
        for first in range(0, self.count, OF_A_PROCESS):
            command = self._command(first, min(OF_A_PROCESS, self.count - first))
            log = (self._at.folder / f"devices-{first}.log").open("w")
            self._processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True))

    def check(self) -> None:
        """Raises `RuntimeError` when one of the processes has ended by itself."""
        for one in self._processes:
            if one.poll() is not None:
                said = "".join(log.read_text()[-2000:] for log in self._at.folder.glob("devices-*.log"))
                raise RuntimeError(f"simulated devices ended: {said}")

    def stop(self) -> list[dict[str, Any]]:
        """Switch them off; how each process ended."""
        for one in self._processes:
            one.send_signal(signal.SIGINT)
        said = [one.communicate(timeout=120)[0] for one in self._processes]
        self._processes = []
        return [json.loads(one) for one in said]

    def kill(self) -> None:
        for one in self._processes:
            one.kill()
            one.wait()


def measure(folder: Path, count: int, interval_s: float, steady_s: float, *, tls: bool) -> Measured:
    """One size."""
    found: dict[Quantity, float] = {}
    with world(folder, interval_s, tls=tls) as at:
        devices = Devices(at, count, interval_s, tls=tls)
        if tls:
            before = at.read()
            devices.enrol()
            note(found, "enrolment", before, at.read())
        rows = at.rows()
        try:
            idle(at, found)
            before = at.read()
            devices.start()
            online = "SELECT count(*) FROM devices WHERE online"

            def everybody() -> bool:
                devices.check()
                return bool(at.ask(online) == count)

            awaited("all devices", everybody)
            note(found, "connect storm", before, at.read())
            found["connect storm", "windows"] = at.windows()
            first = at.roll_out("1")
            awaited("the first version", lambda: at.state(first) == "succeeded", 2.0)
            found["rows", "registered and one version"] = at.rows() - rows
            time.sleep(interval_s)
            steady(at, found, steady_s)
            found |= {("memory", name): mb for name, mb in at.memory_mb().items()}
            before = at.read()
            second = at.roll_out("2")
            awaited("the second version", lambda: at.state(second) == "succeeded", 2.0)
            note(found, "rollout", before, at.read())
            less_telemetry(found)
            time.sleep(interval_s)
            ended = devices.stop()
        finally:
            devices.kill()
        stored = at.windows()
    updated = sum(one["phases"].get(f"{MODEL}@2", {}).get("active", 0) for one in ended)
    windows, acknowledged = (sum(one[name] for one in ended) for name in ("windows", "acknowledged"))
    return Measured(
        count, tls, found, lost_updates=count - updated, lost_samples=max(0, acknowledged - stored),
        repeated_samples=max(0, stored - windows),
    )  # fmt: skip


def note(found: dict[Quantity, float], phase: str, before: Reading, after: Reading) -> None:
    """What a phase took in all."""
    found[phase, "s"] = after.at - before.at
    found[phase, "server CPU s"] = after.server_s - before.server_s
    found[phase, "broker CPU s"] = after.broker_s - before.broker_s
    found[phase, "database CPU s"] = after.database_s - before.database_s


def idle(at: World, found: dict[Quantity, float]) -> None:
    """What they take while nobody is connected."""
    before = at.read()
    time.sleep(IDLE_S)
    after = at.read()
    took = after.at - before.at
    found["idle", "server CPU"] = (after.server_s - before.server_s) / took
    found["idle", "broker CPU"] = (after.broker_s - before.broker_s) / took
    found["idle", "database CPU"] = (after.database_s - before.database_s) / took


def steady(at: World, found: dict[Quantity, float], seconds: float) -> None:
    """What telemetry takes a second."""
    before, bytes_before, rows_before, windows_before = at.read(), at.bytes(), at.rows(), at.windows()
    size = int(at.ask("SELECT pg_database_size(current_database())"))
    time.sleep(seconds)
    after, bytes_after, rows_after = at.read(), at.bytes(), at.rows()
    took = after.at - before.at
    found["telemetry", "server CPU"] = (after.server_s - before.server_s) / took
    found["telemetry", "broker CPU"] = (after.broker_s - before.broker_s) / took
    found["telemetry", "database CPU"] = (after.database_s - before.database_s) / took
    found["telemetry", "bytes/s from devices"] = (bytes_after[0] - bytes_before[0]) / took
    found["telemetry", "bytes/s to devices"] = (bytes_after[1] - bytes_before[1]) / took
    found["telemetry", "windows/s"] = (at.windows() - windows_before) / took
    found["telemetry", "rows/s"] = (rows_after - rows_before) / took
    found["telemetry", "disk bytes/s"] = (int(at.ask("SELECT pg_database_size(current_database())")) - size) / took


def report(checks: Checks, every: Sequence[Measured], interval_s: float, out: Path) -> None:
    for one in every:
        label = f"{one.devices}{', TLS' if one.tls else ''}"
        checks.at_most(f"{label}: updates lost", one.lost_updates, 0)
        checks.at_most(f"{label}: samples lost", one.lost_samples, 0)
        checks.at_most(f"{label}: samples stored twice", one.repeated_samples, 0)
        for (phase, what), value in one.found.items():
            checks.report(f"{label}: {phase}, {what}", value)
    found = lines(every)
    for line in found:
        label = f"{line.phase}, {line.what}{', TLS' if line.tls else ''}"
        checks.report(f"{label}: of 1,000 devices more", line.slope * 1000)
        checks.report(f"{label}: furthest from a straight line, of the largest", line.off)
    asked = "".join(
        f"\nAsked for, {'mutual TLS' if tls else 'without TLS'}:\n\n{asked_for(found, tls=tls, interval_s=interval_s)}"
        for tls in sorted({line.tls for line in found})
    )
    (out / "scale.md").write_text(markdown(every, found) + asked)
    plot(every, found, out / "scale.svg")


def keep(every: Sequence[Measured], out: Path) -> None:
    """Write the figures down, after each size: a long run that fails at the largest has not been for nothing."""
    out.mkdir(parents=True, exist_ok=True)
    (out / FIGURES).write_text(json.dumps([one.plain() for one in every]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two small sizes, to see that it works")
    parser.add_argument("--devices", type=int, action="append", help="sizes; default 1,000, 3,000 and 10,000")
    parser.add_argument("--tls", choices=["on", "off", "both"], default="both", help="mutual TLS; default both")
    parser.add_argument("--interval", type=float, default=30.0, help="seconds of a telemetry window; default 30")
    parser.add_argument("--steady", type=float, default=90.0, help="seconds of telemetry alone; default 90")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench", help="where figures, table and plot are kept")
    parser.add_argument("--beside", type=Path, action="append", default=[], help=f"{FIGURES} of earlier runs")
    given = parser.parse_args()
    sizes = given.devices or ([20, 40] if given.short else [1000, 3000, 10_000])
    interval, steady_s = (1.0, 3.0) if given.short else (given.interval, given.steady)
    checks = Checks("scale")
    every = [Measured.of_plain(one) for path in given.beside for one in json.loads(path.read_text())]
    for tls in {"on": [True], "off": [False], "both": [False, True]}[given.tls]:
        for count in sizes:
            print(f"     {count} devices, {'mutual TLS' if tls else 'no TLS'}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="shoal-scale-") as folder:
                every.append(measure(Path(folder), count, interval, steady_s, tls=tls))
            keep(every, given.out)
    every.sort(key=lambda one: (one.tls, one.devices))
    report(checks, every, interval, given.out)
    print(f"table and plot: {given.out / 'scale.md'}, {given.out / 'scale.svg'}", file=sys.stderr)
    checks.print()


if __name__ == "__main__":
    main()
