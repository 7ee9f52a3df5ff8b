"""One request over several devices, beside one device, in one run: a real server, broker and REST client.

Two forms, since a machine of two cores can't compute for four devices at once:

- `asleep`: devices are processes that speak the agent's protocol and sleep for each row. All but the compute is real.
- `computing`: two real agents run a real net.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from fleet_server.sdk import Client
from fleet_server.sdk.tensors import Array, Gathered, gathered, request_of
from tests.benchmarks.common import Checks
from tests.benchmarks.stages import model_sharding
from tests.fleet import LocalFleet, wait_until, write_classifier

EQUAL_MS, UNEQUAL_MS = (2.0, 2.0, 2.0, 2.0), (0.5, 2.0, 8.0, 2.0)


class Asking:
    """Asks the devices of one fleet.

    Args:
        client: of it.
        model: that they serve.
        outputs: by name, what the first answer was, so that others are compared with it.
    """

    def __init__(self, client: Client, model: str) -> None:
        self._client, self._model = client, model
        self.last: Gathered | None = None

    def seconds(self, rows: Array, *devices: str) -> float:
        body, length = request_of({"x": rows})
        began = time.perf_counter()
        target = f"id=in=({','.join(devices)})"
        answer = self._client.infer(self._model, body, length, target=target, timeout_s=120)
        took = time.perf_counter() - began
        self.last = gathered(*answer, len(rows))
        return took

    def output(self) -> Array:
        assert self.last is not None
        return next(iter(self.last.outputs.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="few rows, to see that it works")
    options = parser.parse_args()
    checks = Checks("distributed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asleep(checks, folder / "asleep", seconds=1.0 if options.short else 8.0)
        computing(checks, folder / "computing", rows=600 if options.short else 20_000)
    model_sharding(checks, short=options.short)
    checks.print()


@contextmanager
def sleeping(fleet: LocalFleet, name: str, row_ms: tuple[float, ...]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Devices as fast as is said, which the server knows."""
    program = str(ROOT / "tests" / "benchmarks" / "sleeping_device.py")
    found = {
        f"{name}-{number}": subprocess.Popen(
            [sys.executable, program, f"{name}-{number}", str(fleet.broker_port), str(one)]
        )
        for number, one in enumerate(row_ms)
    }
    try:
        query = f"model==net;online==true;id=={name}-*"
        wait_until("devices", lambda: len(fleet.get("/devices", query=query)["items"]) == len(found))
        yield found
    finally:
        for process in found.values():
            process.kill()
            process.wait()


def asleep(checks: Checks, folder: Path, *, seconds: float) -> None:
    """Four devices whose compute is a sleep; `seconds` is what one of the equal ones takes for all rows."""
    folder.mkdir()
    fleet = LocalFleet(folder)
    try:
        fleet.start_server()
        write_classifier(folder / "model.onnx")
        fleet.push("net", "1", folder / "model.onnx")
        with Client(fleet.url, fleet.token) as client:
            asking = Asking(client, "net")
            rows = np.random.default_rng(0).random((int(1000 * seconds / EQUAL_MS[0]), 256), dtype=np.float32)
            with sleeping(fleet, "equal", EQUAL_MS) as devices:
                equal(checks, asking, rows, devices)
            with sleeping(fleet, "unequal", UNEQUAL_MS) as devices:
                unequal(checks, asking, rows, devices)
    finally:
        fleet.stop()


def equal(checks: Checks, asking: Asking, rows: Array, devices: dict[str, subprocess.Popen[bytes]]) -> None:
    names = list(devices)
    asking.seconds(rows[: len(rows) // 8], *names)  # how fast each is, is learnt
    one = asking.seconds(rows, names[0])
    alone = asking.output()
    four = asking.seconds(rows, *names)
    checks.at_least("asleep: 4 equal devices, times one", one / four, 3.2)
    same("asleep: rows other than one device's, of 4", checks, asking, alone)
    dying = threading.Timer(four / 2, devices[names[3]].kill)
    dying.start()
    died = asking.seconds(rows, *names)
    dying.join()
    checks.at_most("asleep: one of 4 dies half-way, times all 4 (its share: 4/3)", died / four, 4 / 3)
    same("asleep: rows other than one device's, one died", checks, asking, alone)


def unequal(checks: Checks, asking: Asking, rows: Array, devices: dict[str, subprocess.Popen[bytes]]) -> None:
    names = list(devices)
    asking.seconds(rows[: len(rows) // 8], *names)
    speeds = []
    for name, row_ms in zip(names, UNEQUAL_MS, strict=True):
        some = rows[: max(1, int(len(rows) * EQUAL_MS[0] / row_ms / 4))]
        speeds.append(len(some) / asking.seconds(some, name))
    together = len(rows) / asking.seconds(rows, *names)
    checks.at_least("asleep: unequal devices, of the sum of their speeds", together / sum(speeds), 0.85)
    checks.report("asleep: unequal devices, rows a second", together)


def same(name: str, checks: Checks, asking: Asking, alone: Array) -> None:
    """Bit for bit."""
    here = asking.output()
    differ = int(np.any(here.view(np.uint32) != alone.view(np.uint32), axis=-1).sum())
    checks.at_most(name, differ, 0)


def computing(checks: Checks, folder: Path, *, rows: int) -> None:
    """Two real agents, a real net."""
    folder.mkdir()
    fleet = LocalFleet(folder)
    try:
        fleet.start_server()
        for name in ("left", "right"):
            fleet.start_agent(name)
        fleet.post("/profiles", {"name": "any", "runtime": "onnx", "precisions": ["fp32"]})
        write_classifier(folder / "model.onnx", hidden=1024)
        fleet.push("mlp", "1", folder / "model.onnx")
        fleet.build("mlp@1", "any")
        wait_until("devices", lambda: len(fleet.get("/devices")["items"]) == 2)
        fleet.rollout("mlp@1")
        wait_until("both serve", lambda: len(fleet.get("/devices", query="model==mlp")["items"]) == 2)
        with Client(fleet.url, fleet.token) as client:
            asking = Asking(client, "mlp")
            some = np.random.default_rng(0).random((rows, 8), dtype=np.float32)
            asking.seconds(some, "left", "right")
            one = asking.seconds(some, "left")
            alone = asking.output()
            two = asking.seconds(some, "left", "right")
            checks.report("computing: 2 devices on this machine's cores, times one", one / two)
            same("computing: rows other than one device's, of 2", checks, asking, alone)
            checks.report("computing: rows a second of 2 devices", rows / two)
    finally:
        fleet.stop()


if __name__ == "__main__":
    main()
