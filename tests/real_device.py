"""A device without a server: the real supervisor and its real worker process; link and signatures are made up."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import numpy as np
import pytest

import agent.reporter
import agent.supervisor
from agent.config import Config
from agent.mqtt import LinkUp, MqttChunk, MqttMessage
from agent.protocol.codec import decode, encode
from agent.protocol.commands import Command, CommandAnswer, CommandArguments, CommandPhase
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.protocol.messages import (
    DeploymentReport,
    DesiredDeployment,
    DesiredState,
    ModelWindow,
    Need,
    ProbationPolicy,
    Reported,
    TelemetryAck,
    TelemetryBatch,
)
from agent.protocol.samples import SamplePiece
from agent.protocol.topics import DeviceTopic, broadcast_topic, device_topic
from agent.protocol.version import SPOKEN
from agent.sd_notify import ServiceManager
from agent.supervisor import Supervisor
from tests.faults.device import FACTS, NAME, FakeVerifier, as_read
from tests.fleet import free_port, wait_until

CHUNK = 64 * 1024
INTERVAL_S = 0.2  # of telemetry
# On a busy machine latency and memory say nothing of a version.
POLICY = ProbationPolicy(seconds=0.1, latency_ratio=0.0, growth_mb=0.0)


def manifest(path: Path, version: str, **fields: Any) -> Manifest:
    """Of a classifier as `tests.fleet.write_classifier` makes, as a version of the model `m`."""
    body = path.read_bytes()
    plain = Manifest(
        hashlib.sha256(body).hexdigest(), len(body), CHUNK, "m", version, f"m-{version}", "p",
        ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32,
        (TensorSpec("x", "float32", (-1, 8)),), (TensorSpec("scores", "float32", (-1, 3)),), max_batch=8,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **fields)


class Link:
    """Link and server in one: it has every artifact, and acknowledges all telemetry."""

    epoch = 0
    connected = True

    def __init__(self, put: Callable[[Any], None], contents: dict[str, bytes]) -> None:
        self.put, self.contents = put, contents
        self.reports: list[Reported] = []
        self.windows: list[ModelWindow] = []
        self.pieces: list[SamplePiece] = []
        self.answers: list[CommandAnswer] = []

    def start(self) -> None:
        self.put(LinkUp(0))

    def stop(self) -> None:
        pass

    def keep_by(self, keep: Callable[[MqttChunk], object | None]) -> None:
        self._keep = keep

    def publish(self, leaf: DeviceTopic, payload: bytes, *, retain: bool = False) -> object:
        if leaf is DeviceTopic.REPORTED:
            self.reports.append(decode(payload, Reported))
        elif leaf is DeviceTopic.TELEMETRY:
            batch = decode(payload, TelemetryBatch)
            self.windows += batch.models
            acknowledged = encode(TelemetryAck(batch.spool_id, (batch.sequence,)))
            self.put(MqttMessage(device_topic(NAME, DeviceTopic.TELEMETRY_ACK), acknowledged))
        elif leaf is DeviceTopic.SAMPLES:
            self.pieces.append(decode(payload, SamplePiece))
        elif leaf is DeviceTopic.COMMAND_ANSWER:
            self.answers.append(decode(payload, CommandAnswer))
        return self

    def listen_to_broadcast(self, digest: str) -> None:
        pass

    def stop_listening(self, digest: str) -> None:
        pass

    def say_need(self, need: Need) -> None:
        body = self.contents[need.digest]
        for span in need.missing:
            for chunk in range(span.first, span.last + 1):
                topic = broadcast_topic(need.digest, chunk)
                message = MqttMessage(topic, body[chunk * CHUNK : (chunk + 1) * CHUNK])
                self.put(as_read(message, self._keep))


class RealDevice:
    """Its life is that of a `with` block.

    Args:
        folder: its state is below it.
        patch: replaces its link and its verifier.
        settings: of the agent.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **settings: Any) -> None:
        self._folder, self._patch, self._settings = folder, patch, settings
        self.contents: dict[str, bytes] = {}  # that the link has, by digest
        self._revision = 0
        self.address = f"127.0.0.1:{free_port()}"
        self.link: Link | None = None
        self._supervisor: Supervisor | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        module: Any = agent.supervisor

        def make_link(_config: Config, _boot: str, put: Callable[[Any], None], _context: object) -> Link:
            self.link = Link(put, self.contents)
            return self.link

        self._patch.setattr(module, "MqttLink", make_link)
        self._patch.setattr(module, "Verifier", lambda *_arguments, answered, **_options: FakeVerifier(answered))
        self._patch.setattr(agent.reporter, "measure", lambda *_arguments, **_options: FACTS)
        self._thread.start()
        wait_until("the device", lambda: self.link is not None and self.link.reports)
        return self

    def __exit__(self, *_: object) -> None:
        if self._supervisor is not None:
            self._supervisor.stop()
        self._thread.join(30)

    def _run(self) -> None:
        config = Config(NAME, self._folder, listen=self.address, disk_floor_mb=0.0, **self._settings)
        self._supervisor = Supervisor(config)
        self._supervisor.run(ServiceManager({}))

    def deployment(self, deployment_id: str, path: Path, version: str, **fields: Any) -> DesiredDeployment:
        """A version of the model `m` as it may be desired, with an artifact that the link has."""
        one = manifest(path, version)
        self.contents[one.digest] = path.read_bytes()
        return DesiredDeployment(
            deployment_id, msgspec.Raw(msgspec.json.encode(one)), **{"probation": POLICY, **fields}
        )

    def desire(self, *deployments: DesiredDeployment, **fields: Any) -> None:
        """Say what it ought to run."""
        assert self.link is not None
        self._revision += 1
        state = DesiredState(SPOKEN, "default", self._revision, deployments, telemetry_interval_s=INTERVAL_S, **fields)
        self.link.put(MqttMessage(device_topic(NAME, DeviceTopic.DESIRED), encode(state)))

    def command(
        self,
        command_id: str,
        kind: str,
        *,
        timeout_s: float = 60.0,
        late_s: float = -60.0,
        cancel: bool = False,
        **arguments: Any,
    ) -> None:
        """Send it a command that expires a minute from now."""
        assert self.link is not None
        given = CommandArguments(**arguments)
        sent = Command(command_id, kind, timeout_s, time.time() - late_s, given, cancel)
        self.link.put(MqttMessage(device_topic(NAME, DeviceTopic.COMMAND), encode(sent)))

    def answers(self, command_id: str) -> list[CommandAnswer]:
        """What it said of a command."""
        assert self.link is not None
        return [one for one in self.link.answers if one.command_id == command_id]

    def await_end(self, command_id: str) -> CommandAnswer:
        """Wait until a command is over."""

        def over() -> CommandAnswer | None:
            ends = [one for one in self.answers(command_id) if one.phase is not CommandPhase.RUNNING]
            return ends[-1] if ends else None

        return wait_until(f"the end of {command_id}", over, 90)

    def report(self, deployment_id: str) -> DeploymentReport | None:
        """What it said last of a deployment."""
        assert self.link is not None
        newest = self.link.reports[-1].deployments
        return next((one for one in newest if one.deployment_id == deployment_id), None)

    def await_phase(self, deployment_id: str, phase: Phase) -> DeploymentReport:
        """Wait until it says that a deployment has come so far."""

        def reached() -> DeploymentReport | None:
            found = self.report(deployment_id)
            return found if found is not None and found.phase is phase else None

        return wait_until(f"{deployment_id} being {phase.value}", reached, 60)

    def windows(self, deployment_id: str) -> list[ModelWindow]:
        """What it said that a deployment did."""
        assert self.link is not None
        return [one for one in self.link.windows if one.deployment_id == deployment_id]

    def infer(self, row: np.ndarray, **fields: Any) -> httpx.Response:
        """Ask the model `m`."""
        tensor = {"name": "x", "datatype": "FP32", "shape": list(row.shape), "data": row.flatten().tolist()}
        return httpx.post(f"http://{self.address}/v2/models/m/infer", json={"inputs": [tensor], **fields}, timeout=60)
