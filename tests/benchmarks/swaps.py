"""What clients notice of new versions and of a worker that dies: failures, latency beside a steady hour, memory, time.

Twenty swaps under load by the real worker, each loaded beside the old one, activated, and the old one let go; in turns
with the same load without swaps. Two hundred more for the memory. Then a real agent, whose worker is ended in several
ways while a client asks all the time: how long until it is answered again, beyond what loading the model takes.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import msgspec
import numpy as np

from agent.protocol.manifest import Manifest
from agent.serving.framing import FrameChannel
from agent.serving.ipc import Peek, Peeked, Unload
from tests.benchmarks.common import (
    Checks,
    ask_once,
    closed_loop,
    manifest,
    oip_request,
    quantile,
    told_worker,
    write_conv,
)
from tests.fleet import LocalFleet, wait_until, write_classifier
from tests.processes import descendants
from tests.serving_worker import serve

SIDE = 112


class Swaps:
    """Versions of one model, each the same file under another digest."""

    def __init__(self, channel: FrameChannel, path: Path, first: Manifest) -> None:
        self._channel, self._path, self._now = channel, path, first
        self._number = 0

    def one(self) -> None:
        self._number += 1
        after = msgspec.structs.replace(self._now, digest=f"{self._number:064x}", version=str(self._number + 1))
        serve(self._channel, after, self._path)
        self._channel.send(Unload(after.model, self._now.digest))
        self._now = after

    def memory_mb(self) -> float:
        """The worker's, when what was unloaded has gone."""
        until = time.monotonic() + 20
        while len(self._peek().models) > 1 and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.5)
        return self._peek().rss_mb

    def _peek(self) -> Peeked:
        self._channel.send(Peek(3))
        peeked = self._channel.receive()
        assert isinstance(peeked, Peeked)
        return peeked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a few swaps, to see that it works")
    options = parser.parse_args()
    checks = Checks("swaps")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        net = manifest("large", write_conv(folder / "large", side=SIDE, channels=64, layers=4), max_batch=8)
        with told_worker({folder / "large": net}, folder / "api.sock") as (channel, address):
            swaps = Swaps(channel, folder / "large", net)
            latency(checks, swaps, address, (1, 4) if options.short else (5, 20))
            memory(checks, swaps, 5 if options.short else 200)
        restarts(checks, folder, 1 if options.short else 3)
    checks.print()


def latency(checks: Checks, swaps: Swaps, address: tuple[str, int], shape: tuple[int, int]) -> None:
    """Twenty swaps in as many half seconds, and as long without."""
    rounds, count = shape
    request = oip_request("large", np.random.default_rng(0).random((1, 3, SIDE, SIDE), dtype=np.float32))

    def swap() -> None:
        for number in range(count):
            began = time.monotonic()
            swaps.one()
            time.sleep(max(0.0, 0.5 - (time.monotonic() - began)) if number < count - 1 else 0.0)

    failed = 0

    def asked(during: Callable[[], None]) -> list[float]:
        nonlocal failed
        beside = threading.Thread(target=during)
        beside.start()
        try:
            return closed_loop(address, request, clients=1, seconds=count * 0.5)
        except EOFError:  # its process ends at the first answer that is none
            failed += 1
            return [float("nan")]
        finally:
            beside.join()

    found: dict[str, list[list[float]]] = {"steady": [], "swaps": []}
    for _ in range(rounds):
        found["steady"].append(asked(lambda: None))
        found["swaps"].append(asked(swap))
    checks.report("steady p50, ms", statistics.median(quantile(one, 0.5) for one in found["steady"]))
    for share, name, bound in ((0.5, "p50", 1.02), (0.99, "p99", 1.25)):
        ratios = [
            quantile(during, share) / quantile(steady, share)
            for steady, during in zip(found["steady"], found["swaps"], strict=True)
        ]
        checks.at_most(f"{count} swaps under load: {name} ÷ steady", statistics.median(ratios), bound)
    checks.at_most(f"{count} swaps under load: runs with a failed request", failed, 0)


def memory(checks: Checks, swaps: Swaps, count: int) -> None:
    swaps.one()
    first = swaps.memory_mb()
    for _ in range(count):
        swaps.one()
    checks.at_most(f"memory after {count} swaps ÷ after the first", swaps.memory_mb() / first, 1.1)


def restarts(checks: Checks, folder: Path, rounds: int) -> None:
    """How long a client is not answered when the worker dies, beyond what loading the model took."""
    ends: dict[str, Any] = {"SIGKILL": signal.SIGKILL, "SIGSEGV": signal.SIGSEGV}
    fleet = LocalFleet(folder / "fleet")
    (folder / "fleet").mkdir()
    try:
        fleet.start_server()
        fleet.start_agent("dev-1")
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"]])
        write_classifier(folder / "small", hidden=4096)
        fleet.push("small", "1", folder / "small")
        assert fleet.build("small@1", "any")[0]["state"] == "ready"
        rollout = fleet.rollout("small@1")
        wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
        address = ("127.0.0.1", fleet.agent_ports["dev-1"])
        request = oip_request("small", np.zeros((1, 8), np.float32))
        for name, number in ends.items():
            away = []
            for _ in range(rounds):
                time.sleep(11)  # a worker that lived for less is replaced after a pause
                worker = descendants(fleet.processes["dev-1"].pid, "agent.serving.worker")[0]
                os.kill(worker.pid, number)
                began = time.monotonic()
                while not ask_once(address, request):
                    time.sleep(0.01)
                took = time.monotonic() - began
                serving = wait_until("its word", lambda: fleet.get("/devices/dev-1")["serving"])
                away.append(took - serving[0]["load_s"])
            checks.at_most(f"{name}: s until it answers again, less the load", statistics.median(away), 1.0)
    finally:
        fleet.stop()


if __name__ == "__main__":
    main()
