"""Processes of the delivery benchmark: the server's gateway, agents' downloads, and plain HTTP clients.

Each prints a JSON line when it is ready, begins at a line on its input, and prints another when it is done.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import http.client
import json
import os
import queue
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from agent.config import Config
from agent.mqtt import LinkUp, MqttChunk, MqttLink, MqttMessage
from agent.protocol.codec import encode
from agent.protocol.delivery import Waiting
from agent.protocol.errors import WireErrorCode
from agent.protocol.manifest import DataFile, Manifest
from agent.protocol.messages import Need
from agent.protocol.topics import ParsedChunkTopic, parse_chunk_topic
from agent.update.fetcher import Fetcher, Kept
from agent.update.store import ArtifactStore, Bytes

TICK_S = 0.1
LOST, TWICE, LATE = 0.02, 0.05, 0.05
LATE_S = 0.15


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


def used_s() -> float:
    return time.process_time()


class CountingLink(MqttLink):
    """The agent's own link, which also counts the bytes of its needs."""

    need_bytes = 0

    def say_need(self, need: Need) -> None:
        self.need_bytes += len(encode(need))
        super().say_need(need)


@dataclass
class Shim:
    """Loses, doubles and delays chunks between a link and its fetcher."""

    random: random.Random
    on: bool
    late: list[tuple[float, ParsedChunkTopic, bytes]] = field(default_factory=list)

    def through(self, topic: ParsedChunkTopic, payload: Bytes, now: float) -> list[tuple[ParsedChunkTopic, Bytes]]:
        if not self.on:
            return [(topic, payload)]
        chance = self.random.random()
        if chance < LOST:
            return []
        if chance < LOST + TWICE:
            return [(topic, payload)] * 2
        if chance < LOST + TWICE + LATE:
            self.late.append((now + self.random.uniform(0, LATE_S), topic, bytes(payload)))
            return []
        return [(topic, payload)]

    def due(self, now: float) -> list[tuple[ParsedChunkTopic, bytes]]:
        due = [(topic, payload) for at, topic, payload in self.late if at <= now]
        self.late = [one for one in self.late if one[0] > now]
        return due


class Agent:
    """One device: its link, and what the agent downloads with."""

    def __init__(self, name: str, folder: Path, port: int, content: DataFile, shim: Shim, events: Any) -> None:
        self.content, self.shim = content, shim
        config = Config(name, folder, f"mqtt://127.0.0.1:{port}")
        self.link = CountingLink(config, "boot", lambda event: events.put((self, event)))
        self.store = ArtifactStore(folder / "artifacts")
        self.fetcher = Fetcher(self.store, self.link, str(folder))
        if not shim.on:
            self.link.keep_by(lambda chunk: self.fetcher.keep(parse_chunk_topic(chunk.topic), chunk.payload))
        self.bytes = 0
        self.done_at: float | None = None
        self.failed = ""

    def begin(self, now: float) -> None:
        self.fetcher.begin("deployment", self.content, self, deadline_s=600.0, now=now)
        self.fetcher.tick(now)

    def chunk(self, message: MqttMessage | MqttChunk, now: float) -> None:
        for topic, payload in self.shim.through(parse_chunk_topic(message.topic), message.payload, now):
            self.fetcher.chunk(topic, payload, now)
        if isinstance(message, MqttChunk):
            message.release()
        self.fetcher.tick(now)

    def kept(self, kept: Kept, now: float) -> None:
        self.fetcher.kept(kept, now)
        self.fetcher.tick(now)

    def tick(self, now: float) -> None:
        for topic, payload in self.shim.due(now):
            self.fetcher.chunk(topic, payload, now)
        self.fetcher.tick(now)

    def received(self, key: str, count: int, source: str) -> None:
        self.bytes += count

    def waits(self, key: str, waiting: Waiting | None) -> None:
        pass

    def fetched(self, key: str) -> None:
        self.done_at = time.monotonic()

    def fetch_failed(self, key: str, code: WireErrorCode, detail: str) -> None:
        self.done_at, self.failed = time.monotonic(), f"{code}: {detail}"


def run_agents(folder: Path, port: int, first: int, count: int, digest: str, size: int, chunk: int, lossy: int) -> None:
    """Agents of one process: one thread works off what all their links bring, as the supervisor does for one."""
    events: queue.Queue[tuple[Agent, Any]] = queue.Queue()
    content = DataFile(digest, size, chunk)
    agents = []
    for number in range(first, first + count):
        shim = Shim(random.Random(1000 * lossy + number), on=lossy > 0)
        agents.append(Agent(f"d{number}", folder / f"d{number}", port, content, shim, events))
    for one in agents:
        one.link.start()
    up: set[Agent] = set()
    while len(up) < count:
        agent, event = events.get(timeout=30)
        if isinstance(event, LinkUp):
            up.add(agent)
    say(ready=True)
    sys.stdin.readline()
    before = used_s()
    for one in agents:
        one.begin(time.monotonic())
    next_tick = 0.0
    while any(one.done_at is None for one in agents):
        try:
            agent, event = events.get(timeout=TICK_S)
            if isinstance(event, Kept):
                agent.kept(event, time.monotonic())
            if isinstance(event, MqttChunk) or (isinstance(event, MqttMessage) and "/b/" in event.topic):
                agent.chunk(event, time.monotonic())
        except queue.Empty:
            pass
        if time.monotonic() >= next_tick:
            next_tick = time.monotonic() + TICK_S
            for one in agents:
                one.tick(time.monotonic())
    say(
        done_at=max(one.done_at or 0.0 for one in agents),
        verified=sum(not one.failed and one.store.has(digest) for one in agents),
        cpu_s=used_s() - before,
        bytes=sum(one.bytes for one in agents),
        need_bytes=sum(one.link.need_bytes for one in agents),
        failures=[one.failed for one in agents if one.failed],
    )
    sys.stdin.readline()
    for one in agents:
        one.link.stop()


def run_http(folder: Path, port: int, first: int, count: int, digest: str, size: int, chunk: int, durable: int) -> None:
    """Clients that each download the artifact by HTTP in a thread, hash it on the way and write it to disk."""
    done: list[float] = []
    good: list[bool] = []

    def download(number: int) -> None:
        own = folder / f"h{number}"
        own.mkdir(parents=True)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", f"/{digest}")
        response, seen = connection.getresponse(), hashlib.sha256()
        with (own / "artifact.part").open("wb", buffering=0) as file:
            while piece := response.read(chunk):
                seen.update(piece)
                file.write(piece)
            if durable:
                os.fsync(file.fileno())
        (own / "artifact.part").rename(own / "artifact")
        good.append(seen.hexdigest() == digest)
        done.append(time.monotonic())

    threads = [threading.Thread(target=download, args=(number,)) for number in range(first, first + count)]
    say(ready=True)
    sys.stdin.readline()
    before = used_s()
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    say(done_at=max(done), verified=sum(good), cpu_s=used_s() - before, bytes=size * count, need_bytes=0, failures=[])
    sys.stdin.readline()


def run_server(folder: Path, port: int, artifact: Path, devices: int) -> None:
    """The server's own gateway, with a database in which the devices ought to run the artifact."""
    from fleet_server.catalog.artifacts import ArtifactStore as ServerStore
    from fleet_server.db import Database
    from fleet_server.enrolment.service import Authority
    from fleet_server.gateway.service import Gateway
    from fleet_server.migrations import upgrade
    from fleet_server.principals import DEFAULT_FLEET
    from fleet_server.settings import Settings
    from fleet_server.trust.ca import FleetCa

    folder.mkdir()
    settings = Settings(state_dir=folder, broker_url=f"mqtt://127.0.0.1:{port}")
    upgrade(settings.effective_database_url)
    database = Database(settings.effective_database_url)
    store = ServerStore.open(None, folder=folder / "artifacts")
    digest, size = store.put_file(artifact)
    with database.write() as session:
        _add_rows(session, digest, size, devices)
    authority = Authority(FleetCa.open(folder / "ca", DEFAULT_FLEET), dt.timedelta(days=1), 10)
    gateway = Gateway(settings, database, store, authority)
    gateway.start()
    while not gateway.connected:
        time.sleep(0.02)
    time.sleep(0.5)
    say(ready=True, digest=digest, size=size)
    sys.stdin.read()  # until the benchmark ends, however it does
    gateway.stop()


def _add_rows(session: Any, digest: str, size: int, devices: int) -> None:
    from fleet_server.models import Deployment, Device, Fleet, Model, Profile, Rollout, Variant, Version
    from fleet_server.principals import DEFAULT_FLEET
    from tests.benchmarks.common import TensorSpec, manifest

    fleet = {"fleet_id": DEFAULT_FLEET}
    net = manifest("m", TensorSpec("x", "float32", (-1, 8)), max_batch=1)
    built: dict[str, Any] = {**msgspec.to_builtins(net), "digest": digest, "size": size, "chunk_size": 256 * 1024}
    msgspec.convert(built, Manifest)
    profile = Profile(**fleet, name="p", spec={})
    model = Model(**fleet, name="m")
    session.add(Fleet(id=DEFAULT_FLEET))
    session.flush()
    session.add_all([profile, model])
    session.flush()
    version = Version(**fleet, model_id=model.id, name="1", inputs=[], outputs=[])
    session.add(version)
    session.flush()
    variant = Variant(
        **fleet, version_id=version.id, profile_id=profile.id, profile_spec={}, state="ready", digest=digest, size=size,
        manifest=built,
    )  # fmt: skip
    rollout = Rollout(**fleet, name="r", version_id=version.id, state="running", target={}, strategy={})
    session.add_all([variant, rollout])
    session.flush()
    for number in range(devices):
        session.add(Device(id=f"d{number}", **fleet, profile_id=profile.id))
        session.flush()
        session.add(
            Deployment(
                **fleet, rollout_id=rollout.id, device_id=f"d{number}", model_id=model.id, version_id=version.id,
                variant_id=variant.id, stage=0, phase="downloading", desired=True,
            )
        )  # fmt: skip


def main() -> None:
    kind, folder, *rest = sys.argv[1:]
    if kind == "server":
        run_server(Path(folder), int(rest[0]), Path(rest[1]), int(rest[2]))
        return
    port, first, count, digest, size, chunk, flag = rest
    run = {"agents": run_agents, "http": run_http}[kind]
    run(Path(folder), int(port), int(first), int(count), digest, int(size), int(chunk), int(flag))


if __name__ == "__main__":
    main()
