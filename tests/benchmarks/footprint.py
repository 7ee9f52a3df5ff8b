"""`make bench-footprint`: memory, disk, cold start and idle processor time of an agent, beside a bare script.

The agent runs as it would be installed: a copy of its own and its dependencies' files with compiled modules, so that no
other process on the machine shares their pages. It starts with one active deployment of a 10 MB model, as after a
power cut. The floor is a script with the same libraries, broker and model, and nothing else.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import hashlib
import importlib.metadata
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgspec
import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from agent.protocol.codec import decode, encode
from agent.protocol.lifecycle import Phase
from agent.protocol.limits import LIMITS
from agent.protocol.messages import TelemetryAck, TelemetryBatch
from agent.protocol.topics import DeviceTopic, device_topic, every_shard_filter, parse_device_topic
from agent.update.journal import Journal
from agent.update.updater import Record
from tests.benchmarks.common import (
    Checks,
    ask_once,
    broker,
    closed_loop,
    cpu_s,
    manifest,
    oip_request,
    pss_mb,
    write_mlp,
)
from tests.fleet import free_port
from tests.processes import descendants

WIDTH, LAYERS = 512, 10  # 10.5 MB of weights
MB = 1e6
FLOOR = f"""
import sys, threading
import numpy as np, onnxruntime
import paho.mqtt.client as paho
client = paho.Client(paho.CallbackAPIVersion.VERSION2)
client.connect("127.0.0.1", int(sys.argv[2]))
client.loop_start()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {{"x": np.zeros((1, {WIDTH}), np.float32)}})
print("answered", flush=True)
threading.Event().wait()
"""


@dataclass
class Place:
    """What every start needs.

    Attributes:
        python: of an environment of its own: this interpreter may have been told to look for modules elsewhere.
        libraries: the installed files.
        model: the net's file.
        broker_port: of Mosquitto.
    """

    folder: Path
    python: Path
    libraries: Path
    model: Path
    broker_port: int

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.libraries)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it works")
    options = parser.parse_args()
    rounds, settle_s, idle_s = (1, 0.5, 1.0) if options.short else (7, 4.0, 20.0)
    checks = Checks("footprint")
    with tempfile.TemporaryDirectory() as name, broker(Path(name)) as (port, _), acknowledger(port):
        venv.create(Path(name) / "venv", symlinks=True)
        python = Path(name) / "venv" / "bin" / "python"
        place = Place(Path(name), python, Path(name) / "libraries", Path(name) / "model", port)
        write_mlp(place.model, WIDTH, LAYERS)
        disk(checks, place)
        cold_start(checks, place, rounds)
        floor_memory = measure_floor(checks, place, settle_s)
        measure_agent(checks, place, floor_memory, settle_s, idle_s)
    checks.print()


def disk(checks: Checks, place: Place) -> None:
    """Install the agent, and say what that takes. The runtime is listed beside it: a device chooses its own."""
    place.libraries.mkdir()
    own = [copy_package(ROOT / name, place.libraries) for name in ("agent", "converters", "fleet_server")]
    needed = [
        re.split(r"[^A-Za-z0-9._-]", one)[0] for one in importlib.metadata.requires("shoal") or () if ";" not in one
    ]
    dependencies = {name: copy_distribution(name, place.libraries) for name in needed}
    runtime = sum(copy_distribution(name, place.libraries) for name in ("onnxruntime", "numpy"))
    total = sum(own) + sum(dependencies.values())
    checks.at_most("disk: agent without runtime and Python, MB", total / MB, 35)
    checks.report("disk: of which the package agent, MB", own[0] / MB)
    checks.report("disk: ONNX Runtime and numpy beside it, MB", runtime / MB)


def copy_package(source: Path, target: Path) -> int:
    """Copy one of our packages and compile it, as an installer does; its bytes."""
    copied = target / source.name
    shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(copied, quiet=2)
    return sum(path.stat().st_size for path in copied.rglob("*") if path.is_file())


def copy_distribution(name: str, target: Path) -> int:
    """Copy an installed distribution's files; their bytes."""
    size = 0
    for file in importlib.metadata.files(name) or ():
        source = Path(str(file.locate()))
        if ".." in file.parts or not source.is_file():
            continue  # scripts beside the interpreter
        copied = target / file
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copied)
        size += source.stat().st_size
    return size


@contextlib.contextmanager
def acknowledger(port: int) -> Iterator[None]:
    """Stands in for the server: an agent whose telemetry nobody takes would send it again, and not be idle."""

    def answer(client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        batch = decode(message.payload, TelemetryBatch)
        device = parse_device_topic(message.topic).device_id
        ack = encode(TelemetryAck(batch.spool_id, (batch.sequence,)))
        client.publish(device_topic(device, DeviceTopic.TELEMETRY_ACK), ack, qos=1)

    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_message = answer
    client.connect("127.0.0.1", port)
    client.subscribe(every_shard_filter(DeviceTopic.TELEMETRY), qos=1)
    client.loop_start()
    try:
        yield
    finally:
        client.disconnect()
        client.loop_stop()


@contextlib.contextmanager
def floor(place: Place) -> Iterator[int]:
    """The bare script, when it has answered; its pid."""
    command = [str(place.python), "-c", FLOOR, str(place.model), str(place.broker_port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=place.environment, cwd=place.folder)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"answered\n"
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def agent(place: Place, *, deployed: bool) -> Iterator[tuple[int, tuple[str, int]]]:
    """An agent that has answered its first inference, or that merely listens; its pid and address."""
    with tempfile.TemporaryDirectory(dir=place.folder) as name:
        state, port = Path(name), free_port()
        if deployed:
            deploy(state, place.model)
        config = state / "agent.toml"
        config.write_text(
            f'device_id = "bench"\nstate_dir = "{state}"\nbroker = "mqtt://127.0.0.1:{place.broker_port}"\n'
            f'listen = "127.0.0.1:{port}"\nlog_level = "ERROR"\n'
        )
        command = [str(place.python), "-m", "agent.main", "run", "--config", str(config)]
        process = subprocess.Popen(command, env=place.environment, cwd=place.folder)
        try:
            request = oip_request("large", np.zeros((1, WIDTH), np.float32))
            live = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
            while not ask_once(("127.0.0.1", port), request if deployed else live):
                if process.poll() is not None:
                    raise RuntimeError("the agent ended")
                time.sleep(0.003)
            yield process.pid, ("127.0.0.1", port)
        finally:
            process.terminate()
            process.wait(20)


def deploy(state: Path, model: Path) -> None:
    """What an agent's disk holds when a deployment is active."""
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    (state / "artifacts").mkdir()
    shutil.copyfile(model, state / "artifacts" / digest)
    net = msgspec.structs.replace(
        manifest("large", write_mlp(state / "unused", WIDTH, 1), max_batch=8),
        digest=digest,
        size=model.stat().st_size,
        chunk_size=LIMITS.chunk_bytes,
    )
    (state / "unused").unlink()
    journal = Journal(state / "journal.db")
    journal.save({"1": Record("1", net, probation_s=0, deadline_s=60, phase=Phase.ACTIVE)})
    journal.close()


def cold_start(checks: Checks, place: Place, rounds: int) -> None:
    """From starting the process to its first answer; floor and agent take turns."""
    found: dict[str, list[float]] = {"floor": [], "agent": []}
    ways: dict[str, Callable[[], Any]] = {"floor": lambda: floor(place), "agent": lambda: agent(place, deployed=True)}
    for _ in range(rounds):
        for way, start in ways.items():
            began = time.perf_counter()
            with start():
                found[way].append(time.perf_counter() - began)
    bare, ours = (statistics.median(found[way]) for way in ("floor", "agent"))
    checks.report("cold start: floor's first inference, s", bare)
    checks.at_most("cold start: agent's first inference ÷ floor's", ours / bare, 1.2)


def worker_of(supervisor: int) -> int:
    """The pid of an agent's inference worker. It may have other children for a moment, which look what there is."""
    [worker] = descendants(supervisor, "agent.serving.worker")
    return worker.pid


def measure_floor(checks: Checks, place: Place, settle_s: float) -> float:
    with floor(place) as pid:
        time.sleep(settle_s)
        memory = pss_mb(pid)
    checks.report("memory: floor (paho, ONNX Runtime, 10 MB model), PSS MB", memory)
    return memory


def measure_agent(checks: Checks, place: Place, floor_memory: float, settle_s: float, idle_s: float) -> None:
    with agent(place, deployed=False) as (supervisor, _):
        time.sleep(settle_s)
        worker = worker_of(supervisor)
        checks.at_most("memory: supervisor, nothing deployed, PSS MB", pss_mb(supervisor), 27)
        checks.report("memory: worker, nothing deployed, PSS MB", pss_mb(worker))
    with agent(place, deployed=True) as (supervisor, address):
        row = np.random.default_rng(0).random((1, WIDTH), dtype=np.float32)
        closed_loop(address, oip_request("large", row), clients=4, seconds=settle_s / 2)
        time.sleep(settle_s)
        worker = worker_of(supervisor)
        began, before = time.perf_counter(), (cpu_s(supervisor), cpu_s(worker))
        time.sleep(idle_s)
        took = time.perf_counter() - began
        used = [cpu_s(pid) - at for pid, at in zip((supervisor, worker), before, strict=True)]
        memory = (pss_mb(supervisor), pss_mb(worker))
    checks.at_most("memory: supervisor, 10 MB model deployed, PSS MB", memory[0], 27)
    checks.at_most("memory: worker, 10 MB model loaded, has answered, PSS MB", memory[1], 62)
    checks.report("memory: supervisor and worker ÷ floor", sum(memory) / floor_memory)
    checks.at_most("idle: processor time, both processes, % of one core", sum(used) / took * 100, 0.2)
    checks.report("idle: of which the supervisor, %", used[0] / took * 100)


if __name__ == "__main__":
    main()
