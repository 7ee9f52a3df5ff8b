"""A net in stages: answers beside the whole's, memory beside a device's limit, throughput beside the slowest stage's.

Two forms. *Sleeps*: a device is a thread that computes its stage for real and then sleeps until the time is over that
it was planned to take, compute and link, scaled so that the slowest takes a calibrated time; so it shows whether all
stages work at once, on however few cores. *Real compute*: each of two devices is the agent's own inference worker on
one core, asked through its local API; nothing sleeps. In both this process passes tensors from device to device.

Then the whole product: a server, a broker and two agents on this machine, asked by REST. There is nothing but these
cores to compute on, and they also run the server, the broker and this program.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgspec
import numpy as np
import onnx

from agent.client import Client
from agent.protocol.manifest import ModelFormat, RuntimeName
from converters.job import ShardDevice, Sharding, ShardJob, SourceFile, StageFile, Target
from converters.package import manifest_for, onnx_specs
from converters.sharding.cutter import run_stages
from converters.sharding.graph import open_session
from converters.sharding.shard import shard
from fleet_server.sdk import Client as RestClient
from fleet_server.sdk.tensors import gathered, request_of
from tests.benchmarks.common import Array, Checks, pss_mb, write_mlp
from tests.fleet import LocalFleet, wait_until
from tests.serving_worker import serve, start_worker

WIDTH, LAYERS, ROWS = 1024, 12, 128
TARGET = Target("bench", RuntimeName.ONNX, ("cpu",), (), threads=1, max_batch=ROWS)
SLOWEST_S = 0.06
ROUNDS = 5
TOLERANCE = 1e-5
COPIES = 2  # of weights that a runtime may hold, as in fleet_server.domain.sharding.MEMORY_SHARE
Tensors = dict[str, Array]
Device = Callable[[Tensors], Tensors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few seconds, to see that it works")
    options = parser.parse_args()
    checks = Checks("stages")
    model_sharding(checks, short=options.short)
    checks.print()


def model_sharding(checks: Checks, *, short: bool) -> None:
    """All checks of a net in 2 and 3 stages."""
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole.onnx"
        write_mlp(whole, WIDTH // 4 if short else WIDTH, LAYERS)
        batches = 12 if short else 40
        rng = np.random.default_rng(1)
        rows = [rng.standard_normal((ROWS, WIDTH // 4 if short else WIDTH), dtype=np.float32) for _ in range(batches)]
        session = open_session(onnx.load(whole), plain=False)
        expected = [session.run(["y"], {"x": one})[0] for one in rows]
        del session
        growth = _growth(whole, rows[0], "whole")
        for count, share in ((2, 0.85), (3, 0.65)):
            limit = growth * share
            folder = Path(name) / str(count)
            folder.mkdir()
            devices = tuple(ShardDevice(f"d{number}", limit * 2**20 / COPIES) for number in range(count))
            found = shard(_job(whole, devices, count), folder, lambda _, __: None)
            checks.at_most(f"{count} stages: largest difference, optimized, relative", found.difference, TOLERANCE)
            checks.add(f"{count} stages: bit for bit, unoptimized", float(found.exact), "= 1", holds=found.exact)
            _memory(checks, found, folder, rows[0], limit, growth)
            _sleeping(checks, found, folder, rows, expected)
            if count == 2:
                _real(checks, found, folder, rows, expected)
        _fleet(checks, Path(name) / "fleet", whole, np.concatenate(rows), np.concatenate(expected))


def _job(path: Path, devices: tuple[ShardDevice, ...], count: int) -> ShardJob:
    return ShardJob(SourceFile(ModelFormat.ONNX, "0" * 64, str(path)), devices, count, ROWS)


def _memory(checks: Checks, found: Sharding, folder: Path, row: Array, limit: float, whole: float) -> None:
    """What each stage adds to a worker that serves it, beside the limit of its device, which the whole breaks."""
    count = len(found.stages)
    checks.add(f"{count} stages: MiB of the whole, too much", whole, f"> {limit:.4g}", holds=whole > limit)
    arrays: Tensors = {"x": row}
    models = [onnx.load(folder / stage.path) for stage in found.stages]
    outputs = [arrays, *run_stages(models, arrays)]
    for number, stage in enumerate(found.stages):
        added = _growth(folder / stage.path, outputs[number], f"stage-{number}")
        checks.at_most(f"{count} stages: MiB of stage {number + 1} on its device", added, limit)


def _growth(path: Path, inputs: Array | Tensors, name: str) -> float:
    """MiB that serving a model adds to a fresh worker."""
    with _worker(path, name) as (address, pid, before), Client(address) as client:
        client.infer(name, inputs if isinstance(inputs, dict) else {"x": inputs})
        return pss_mb(pid) - before


@contextmanager
def _worker(path: Path, name: str, core: int | None = None) -> Iterator[tuple[str, int, float]]:
    """The agent's inference worker with one model: address, pid, and MiB before it was loaded."""
    started = start_worker(forked=False)
    try:
        if core is not None:
            os.sched_setaffinity(started.process.pid, {core})
        before = pss_mb(started.process.pid)
        specs = onnx_specs(onnx.load(path))
        net = msgspec.structs.replace(manifest_for(path, specs, ModelFormat.ONNX, TARGET), model=name, version="1")
        serve(started.channel, net, path)
        host, port = started.address
        yield f"{host}:{port}", started.process.pid, before
    finally:
        started.channel.close()
        started.process.wait(30)


def _sleeping(checks: Checks, found: Sharding, folder: Path, rows: list[Array], expected: list[Array]) -> None:
    scale = SLOWEST_S / max(_planned(stage) for stage in found.stages)
    devices = [_asleep(folder / stage.path, _planned(stage) * scale) for stage in found.stages]
    seconds, answers = pipelined(devices, rows)
    count = len(found.stages)
    bound = len(rows) * SLOWEST_S
    checks.at_most(f"{count} stages, sleeps: largest difference", _difference(answers, expected), TOLERANCE)
    checks.at_least(f"{count} stages, sleeps: throughput, of the slowest stage's bound", bound / seconds, 0.8)
    total = sum(_planned(stage) for stage in found.stages)
    checks.report(f"{count} stages, sleeps: times one after the other", len(rows) * total * scale / seconds)


def _planned(stage: StageFile) -> float:
    return stage.compute_s + stage.transfer_s


def _asleep(path: Path, seconds: float) -> Device:
    """A device that does one thing at a time and takes so long for it."""
    session = open_session(onnx.load(path), plain=False)
    names = [value.name for value in session.get_outputs()]
    turn = threading.Lock()

    def run(arrays: Tensors) -> Tensors:
        with turn:
            ends = time.perf_counter() + seconds
            found = dict(zip(names, session.run(names, arrays), strict=True))
            time.sleep(max(0.0, ends - time.perf_counter()))
            return found

    return run


def _real(checks: Checks, found: Sharding, folder: Path, rows: list[Array], expected: list[Array]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        devices = []
        for number, stage in enumerate(found.stages):
            core = cores[number % len(cores)]
            address, _, _ = stack.enter_context(_worker(folder / stage.path, f"stage-{number}", core))
            client = stack.enter_context(Client(address))
            devices.append(_asking(client, f"stage-{number}"))
        inputs = [[{"x": one} for one in rows]]
        for device in devices[:-1]:
            inputs.append([device(one) for one in inputs[-1]])
        shares = []
        for _ in range(ROUNDS):  # in turns: what else the machine does meets both
            before = max(_alone(device, given) for device, given in zip(devices, inputs, strict=True))
            seconds, answers = pipelined(devices, rows)
            after = max(_alone(device, given) for device, given in zip(devices, inputs, strict=True))
            shares.append((before + after) / 2 / seconds)
    checks.at_most("2 stages, real compute: largest difference", _difference(answers, expected), TOLERANCE)
    checks.at_least("2 stages, real compute: throughput, of the slowest stage's alone", statistics.median(shares), 0.8)


def _fleet(checks: Checks, folder: Path, whole: Path, rows: Array, expected: Array) -> None:
    folder.mkdir()
    fleet = LocalFleet(folder)
    try:
        fleet.start_server(SHOAL_PROBATION_S="1")
        for name in ("left", "right"):
            fleet.start_agent(name, tables='[inference]\naddress = "127.0.0.1:{port}"\n')
        fleet.post("/profiles", {"name": "any", "runtime": "onnx", "precisions": ["fp32"]})
        sources = [{"format": "onnx", "digest": fleet.upload(whole)}]
        fleet.post("/models/deep/versions", {"name": "1", "sources": sources})
        wait_until("devices", lambda: len(fleet.get("/devices", query="online==true;profile==any")["items"]) == 2)
        plan = fleet.post("/shard-plans", {"version": "deep@1", "target": "online==true", "stages": 2, "rows": ROWS})
        wait_until("stages", lambda: fleet.get(f"/shard-plans/{plan['id']}")["state"] == "active", 120)
        with RestClient(fleet.url, fleet.token) as client:
            _through_fleet(checks, client, plan["stages"], rows, expected)
    finally:
        fleet.stop()


def _through_fleet(
    checks: Checks, client: RestClient, stages: list[dict[str, Any]], rows: Array, expected: Array
) -> None:
    def asked(model: str, arrays: Tensors) -> tuple[float, Tensors]:
        body, length = request_of(arrays)
        began = time.perf_counter()
        answer = gathered(*client.infer(model, body, length, timeout_s=120), len(rows))
        return time.perf_counter() - began, dict(answer.outputs)

    asked("deep", {"x": rows})  # how fast it is, is learnt
    shares, difference = [], 0.0
    for number in range(ROUNDS):
        arrays, alone = {"x": rows}, []
        for stage in stages:
            took, arrays = asked(stage["model"], arrays)
            alone.append(took)
        took, outputs = asked("deep", {"x": rows})
        if number:  # how fast a stage is alone, is learnt in the first
            shares.append(max(alone) / took)
        difference = max(difference, _difference([outputs["y"]], [expected]))
    checks.at_most("2 stages, server and agents: largest difference", difference, TOLERANCE)
    checks.at_least(
        "2 stages, server and agents: throughput, of the slowest stage's alone", statistics.median(shares), 0.8
    )


def _asking(client: Client, model: str) -> Device:
    return lambda arrays: dict(client.infer(model, arrays))


def _alone(device: Device, inputs: Sequence[Tensors]) -> float:
    """Seconds of a stage for all micro-batches, two in flight, while no other works."""
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(device, inputs))
    return time.perf_counter() - started


def pipelined(devices: Sequence[Device], rows: Sequence[Array]) -> tuple[float, list[Array]]:
    """Seconds of all micro-batches through all devices, two in flight a device, and the answers in order."""

    def through(one: Array) -> Array:
        arrays: Tensors = {"x": one}
        for device in devices:
            arrays = device(arrays)
        return arrays["y"]

    started = time.perf_counter()
    with ThreadPoolExecutor(2 * len(devices)) as pool:
        answers = list(pool.map(through, rows))
    return time.perf_counter() - started, answers


def _difference(answers: Sequence[Array], expected: Sequence[Any]) -> float:
    scale = max(1.0, *(float(np.abs(one).max()) for one in expected))
    return max(float(np.abs(a - b).max()) for a, b in zip(answers, expected, strict=True)) / scale


if __name__ == "__main__":
    main()
