"""A whole device in one process: the real supervisor, with a link, a worker and a server that are made up.

The server goes through a script of desired states, each when the device has reported that the last one is done. What it
and the worker see is appended to a log outside of the device's folder, which outlives the process; what must never
happen is looked for there and then.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import agent.files
import agent.reporter
import agent.supervisor
import agent.update.download
from agent.config import Config
from agent.mqtt import LinkUp, MqttChunk, MqttMessage
from agent.packets import Buffers
from agent.protocol.codec import decode
from agent.protocol.errors import WireErrorCode
from agent.protocol.facts import DeviceFacts
from agent.protocol.lifecycle import ENDED, Phase
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.protocol.messages import DesiredDeployment, DesiredState, Need, Reported
from agent.protocol.topics import DeviceTopic, broadcast_topic, device_topic
from agent.protocol.version import SPOKEN
from agent.sd_notify import ServiceManager
from agent.serving.ipc import Activate, Activated, Collect, Load, Loaded, Peek, Peeked, Ready, Unload, Window
from agent.supervisor import Supervisor

NAME = "dev-1"
CHUNK = 1000
SECONDS = 25.0
OFFLINE_POLLS = 60  # a few rounds of the main loop
FACTS = DeviceFacts(
    agent_version="1", os="", kernel="", arch="x86_64", cpu_model="", cpu_cores=1, cpu_features=(), memory_mb=1,
    disk_free_mb=1,
)  # fmt: skip


def content(model: str, version: str) -> bytes:
    """The artifact of a version: five chunks, the last one short."""
    return random.Random(f"{model}@{version}").randbytes(4 * CHUNK + 321)


def manifest(model: str, version: str) -> Manifest:
    body = content(model, version)
    return Manifest(
        hashlib.sha256(body).hexdigest(), len(body), CHUNK, model, version, f"{model}-{version}", "p",
        ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32,
        (TensorSpec("x", "float32", (-1, 2)),), (TensorSpec("y", "float32", (-1, 2)),),
    )  # fmt: skip


# What is desired, step by step: deployment id to model and version. The last but one goes back to what served before.
SCRIPT: tuple[dict[str, tuple[str, str]], ...] = (
    {"d1": ("m", "1")},
    {"d2": ("m", "2"), "d3": ("n", "1")},
    {"d4": ("m", "3"), "d3": ("n", "1")},
    {"d5": ("m", "2")},
)
DAMAGED_ONCE = hashlib.sha256(content("m", "3")).hexdigest()


class Log:
    """What was seen, in a file that outlives the process."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        lines = path.read_text().splitlines()
        seen = [json.loads(line) for line in lines]
        steps = [one for one in seen if "step" in one]
        self.step = steps[-1]["step"] if steps else 0
        self.revision = steps[-1]["revision"] if steps else 1
        self.tries = steps[-1]["tries"] if steps else 0
        self.excused: set[str] = set()  # models that may be unserved after a restart: all that could serve was damaged
        self.problems = [one["problems"] for one in seen if "problems" in one]
        serving = [one["active"] for one in seen if "active" in one]
        self.active: dict[str, str] = serving[-1] if serving else {}  # versions that were reported to serve for good
        self.damaged = any("damaged" in one for one in seen)
        self._write = os.write

    def next(self, *, step: int, tries: int) -> None:
        """The server wants something else."""
        self.step, self.tries, self.revision = step, tries, self.revision + 1
        self.say(step=step, tries=tries, revision=self.revision)

    def wanted(self) -> dict[str, tuple[str, str]]:
        """What ought to run: what was tried before has an id of its own each time."""
        return {f"{key}-{self.tries}" if self.tries else key: one for key, one in SCRIPT[self.step].items()}

    def say(self, **fields: Any) -> None:
        self._write(self._descriptor, (json.dumps(fields) + "\n").encode())


class FakeWorker:
    """The worker as the supervisor sees it. It loads nothing but bytes that are those of the manifest."""

    def __init__(self, put: Callable[[Any], None], log: Log) -> None:
        self._put, self._log = put, log
        self.generation = 0
        self.loaded: dict[tuple[str, str], Manifest] = {}
        self.serving: dict[str, Manifest] = {}
        self.untold: list[Activated] = []  # swaps that the supervisor has not heard of
        self.peer_place: str | None = None  # no peer asks it

    def place(self) -> tuple[str, str]:
        return "127.0.0.1:1", ""  # the server sends it no rows

    def start(self) -> None:
        self.generation += 1
        self._put((self.generation, Ready("")))

    def send(self, message: Any) -> bool:
        match message:
            case Load():
                right = hashlib.sha256(Path(message.path).read_bytes()).hexdigest() == message.manifest.digest
                if not right:
                    self._log.say(violation=f"unverified bytes of {message.manifest.model} were to be run")
                self.loaded[message.manifest.model, message.manifest.digest] = message.manifest
                self._answer(Loaded(message.request_id, "fake", "cpu", 0.0))
            case Activate():
                found = self.loaded.get((message.model, message.digest))
                if found is not None:
                    self.serving[message.model] = found
                self.untold.append(Activated(message.request_id, found is not None))
                self._answer(self.untold[-1])
            case Unload():
                self.loaded.pop((message.model, message.digest), None)
                serving = self.serving.get(message.model)
                if serving is not None and serving.digest == message.digest:
                    del self.serving[message.model]
                    if any(message.model == model for model, _ in self._log.wanted().values()):
                        self._log.say(violation=f"{message.model} was taken away while it was wanted")
            case Collect():
                self._answer(Window(message.request_id, (), 1.0))
            case Peek():
                self._answer(Peeked(message.request_id, (), 1.0))
        return True

    def kill(self) -> None:
        self._log.say(violation="the worker was taken for stuck")

    def _answer(self, message: Any) -> None:
        self._put((self.generation, message))

    def reap(self) -> int:
        return 0

    def stop(self) -> None:
        self.generation += 1


def as_read(message: MqttMessage, keep: Callable[[MqttChunk], object | None]) -> object:
    """What the real link puts for a chunk that is as large as chunks are."""
    chunk = MqttChunk(message.topic, memoryview(message.payload), bytearray(), Buffers())
    return keep(chunk) or chunk


class FakeLink:
    """Link and server in one: it connects late, so that what serves before can be seen."""

    epoch = 0

    def __init__(self, put: Callable[[Any], None], log: Log, done: Callable[[], None]) -> None:
        self._put, self._log, self._done = put, log, done
        self._polls = 0
        self.chance: random.Random | None = None  # decides what becomes of chunks on a bad network
        self._held: list[MqttMessage] = []
        self.storage_fails: frozenset[WireErrorCode] = (
            frozenset()
        )  # with which a deployment may fail, and is tried again
        self._up = False
        self.worker: FakeWorker | None = None

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def keep_by(self, keep: Callable[[MqttChunk], object | None]) -> None:
        self._keep = keep

    @property
    def connected(self) -> bool:
        self._polls += 1
        if not self._up and self._polls > OFFLINE_POLLS:
            self._up = True
            self._check_offline()
            self._put(LinkUp(0))
        return self._up

    def _check_offline(self) -> None:
        """Before there is any network, what served for good serves, or something that came after it."""
        assert self.worker is not None
        wanted = {model for model, _ in self._log.wanted().values()} - self._log.excused
        for model, version in self._log.active.items():
            if model in wanted and model not in self.worker.serving:
                self._log.say(violation=f"{model}@{version} served before, and {model} is not served after the restart")

    def publish(self, leaf: DeviceTopic, payload: bytes, *, retain: bool = False) -> None:
        if leaf is DeviceTopic.REPORTED and self._up:
            self._reported(decode(payload, Reported))

    def listen_to_broadcast(self, digest: str) -> None:
        pass

    def stop_listening(self, digest: str) -> None:
        pass

    def say_need(self, need: Need) -> None:
        contents = {
            manifest(model, version).digest: content(model, version)
            for step in SCRIPT
            for model, version in step.values()
        }
        body = contents[need.digest]
        for span in need.missing:
            for chunk in range(span.first, span.last + 1):
                payload = body[chunk * CHUNK : (chunk + 1) * CHUNK]
                if need.digest == DAMAGED_ONCE and chunk == 1 and not self._log.damaged:
                    self._log.damaged = True
                    self._log.say(damaged=True)
                    payload = payload[::-1]
                self._send(MqttMessage(broadcast_topic(need.digest, chunk), payload))

    def _send(self, message: MqttMessage) -> None:
        if self.chance is None:
            self._bring(message)
            return
        fate = self.chance.choice(["lost", "doubled", "late", "whole", "whole"])
        if fate == "late":
            self._held.append(message)
        elif fate != "lost":
            for _ in range(1 + (fate == "doubled")):
                self._bring(message)
            self.chance.shuffle(self._held)
            while self._held and self.chance.random() < 0.5:
                self._bring(self._held.pop())

    def _bring(self, message: MqttMessage) -> None:
        self._put(as_read(message, self._keep))

    def _reported(self, reported: Reported) -> None:
        assert self.worker is not None
        says = {one.model: one.digest for one in reported.serving}
        runs = {model: one.digest for model, one in self.worker.serving.items()}
        if says != runs and not self.worker.untold:
            self._log.say(violation=f"reported {sorted(says)} and runs {sorted(runs)}, or others of them")
        phases = {one.deployment_id: one for one in reported.deployments}
        active = {one.model: one.version for one in reported.deployments if one.phase is Phase.ACTIVE}
        self._log.say(active=active)
        if reported.problems:
            self._log.say(problems=sorted({one.code for one in reported.problems}))
        wanted = self._log.wanted()
        for key in wanted:
            if key in phases and phases[key].phase in ENDED:
                failure = phases[key].failure
                if failure is None or failure.code not in self.storage_fails:
                    self._log.say(violation=f"{key} ended as {phases[key].phase.value}: {failure}")
                    self._done()
                elif reported.revision == self._log.revision:
                    self._log.next(step=self._log.step, tries=self._log.tries + 1)  # somebody rolls it out again
                    break
        if reported.revision == self._log.revision and all(
            key in phases and phases[key].phase is Phase.ACTIVE and says.get(model) == manifest(model, version).digest
            for key, (model, version) in wanted.items()
        ):
            if len(says) != len(wanted):
                return
            if self._log.step + 1 == len(SCRIPT):
                self._log.say(finished=True)
                self._done()
                return
            self._log.next(step=self._log.step + 1, tries=self._log.tries)
        if reported.revision != self._log.revision:
            self._desire()

    def _desire(self) -> None:
        deployments = tuple(
            DesiredDeployment(key, msgspec.Raw(msgspec.json.encode(manifest(model, version))), probation_s=0.01)
            for key, (model, version) in self._log.wanted().items()
        )
        state = DesiredState(SPOKEN, "default", self._log.revision, deployments, telemetry_interval_s=0.1)
        self._put(MqttMessage(device_topic(NAME, DeviceTopic.DESIRED), msgspec.json.encode(state)))


class FakeVerifier:
    """Everything is signed."""

    busy = False

    def __init__(self, answered: Callable[[str, WireErrorCode | None, str], None]) -> None:
        self._answered = answered
        self._waiting: list[str] = []

    def check(self, key: str, targets: object) -> None:
        self._waiting.append(key)

    def cancel(self, key: str) -> None:
        self._waiting = [one for one in self._waiting if one != key]

    def link_up(self) -> None:
        pass

    def tick(self, now: float) -> None:
        for key in self._waiting:
            self._waiting = [one for one in self._waiting if one != key]
            self._answered(key, None, "")

    def stop(self) -> None:
        pass


def event_message(event: Any) -> Any:
    """What the worker said, where an event is that."""
    return event[1] if isinstance(event, tuple) else None


def run(
    folder: Path,
    log_path: Path,
    *,
    boot: int,
    before: Callable[[], None] = lambda: None,
    each: Callable[[Log], None] = lambda _log: None,
    storage_fails: frozenset[WireErrorCode] = frozenset(),
    excused: frozenset[str] = frozenset(),
    network: int | None = None,
    **settings: Any,
) -> None:
    """Run the device until the script is done, or time is up. It changes this process for good: call it in a child.

    Args:
        folder: the device's state.
        log_path: what is seen.
        boot: which start of the machine this is.
        before: called when everything is ready to begin, such as to begin to watch the disk.
        each: called again and again.
        storage_fails: codes that a deployment may fail with: it is then rolled out again.
        excused: models that need not be served before there is a network.
        network: seed of one that loses, doubles and reorders chunks; None for a good one.
        settings: of the agent.
    """
    agent.files.BOOT_ID = folder.parent / "boot-id"
    agent.files.BOOT_ID.write_text(f"{boot:032x}")
    log = Log(log_path)
    log.excused = set(excused)
    module: Any = agent.supervisor
    worker: list[FakeWorker] = []
    link: list[FakeLink] = []

    def make_worker(_config: Config, put: Callable[[Any], None]) -> FakeWorker:
        worker.append(FakeWorker(put, log))
        return worker[0]

    def make_link(_config: Config, _boot: str, put: Callable[[Any], None], _context: object) -> FakeLink:
        link.append(FakeLink(put, log, lambda: supervisor.stop()))  # noqa: PLW0108 (it is made later)
        return link[0]

    module.WorkerProcess, module.MqttLink = make_worker, make_link
    module.Verifier = lambda *_arguments, answered, **_options: FakeVerifier(answered)
    module.TICK_S = module.QUIET_TICK_S = 0.001
    reports: Any = agent.reporter
    reports.measure, reports.FACTS_WITHIN_S = lambda *_arguments, **_options: FACTS, 0.001
    until = time.monotonic() + SECONDS

    class Watched(Supervisor):
        def _handle(self, event: Any) -> None:
            worker[0].untold = [one for one in worker[0].untold if one is not event_message(event)]
            super()._handle(event)

        @property
        def _steps(self) -> tuple[Callable[[], None], ...]:
            return (*super()._steps, self._look)

        def _look(self) -> None:
            each(log)
            if time.monotonic() > until:
                log.say(violation=f"not done after {SECONDS:.0f} s")
                self.stop()

    before()
    supervisor = Watched(Config(NAME, folder, **{"disk_floor_mb": 0.0, **settings}))
    link[0].worker, link[0].storage_fails = worker[0], storage_fails
    if network is not None:
        link[0].chance = random.Random(network)
        agent.update.download.STALLED_S = 0.01
    supervisor.run(ServiceManager({}))
