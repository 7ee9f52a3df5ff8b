"""What it brings to ask a peer of the LAN when a device is over its bound, and what that costs, in one run.

Devices are real workers that know each other by mutual TLS. Their compute is a sleep, since a machine of two cores
can't compute for three at once; all else is real.
"""

from __future__ import annotations

import argparse
import http.client
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from agent.protocol.manifest import Scheduling
from tests.benchmarks.common import Checks, closed_loop, oip_request
from tests.lan import FULL, Device, Lan, Reply, request

QUEUE = 16
SIZES = {"12 bytes": 3, "150 KB": 37_500}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="few requests, to see that it works")
    options = parser.parse_args()
    checks = Checks("lan")
    with tempfile.TemporaryDirectory() as name:
        bursts(checks, Path(name) / "bursts", times=1 if options.short else 5)
        added(checks, Path(name) / "added", times=30 if options.short else 300)
        unaffected(checks, Path(name) / "unaffected", seconds=0.5 if options.short else 3.0)
    checks.print()


def bursts(checks: Checks, folder: Path, *, times: int) -> None:
    """Twice as many requests at once as a device has room for."""
    lan = Lan(folder)
    try:
        one, *others = (lan.device(name) for name in ("one", "two", "three"))
        for device in (one, *others):
            device.serve(50.0, scheduling=Scheduling(queue_limit=QUEUE))
            device.told()
        count = 2 * (QUEUE + 1)
        one.flood(count)  # what is first is slower
        alone = [answered(one.flood(count)) for _ in range(times)]
        one.told(*others)
        helped = [answered(one.flood(count)) for _ in range(times)]
        checks.report("answered of a burst twice the bound, alone", statistics.mean(alone))
        checks.at_least("the same with two peers", statistics.mean(helped), 0.98)
    finally:
        lan.end()


def answered(replies: list[Reply]) -> float:
    return sum(status == 200 for status, _, _ in replies) / len(replies)


def added(checks: Checks, folder: Path, *, times: int) -> None:
    """One client, whose requests a full device forwards to an idle one, or who asks that itself."""
    lan = Lan(folder)
    try:
        full, idle = lan.device("full"), lan.device("idle")
        full.serve(20.0, scheduling=FULL)
        idle.serve(20.0, scheduling=FULL)
        full.told(idle)
        idle.told()
        with full.held():
            for name, width in SIZES.items():
                checks.report(f"forwarding adds to {name}, ms of the median", more_ms(full, idle, width, times))
    finally:
        lan.end()


def more_ms(full: Device, idle: Device, width: int, times: int) -> float:
    row = np.zeros((1, width), np.float32)
    by_peer, direct = Asking(full, row), Asking(idle, row)
    took: dict[Asking, list[float]] = {by_peer: [], direct: []}
    for number in range(times + 5):
        for asking, seconds in took.items():
            took_s = asking.seconds()
            if number >= 5:
                seconds.append(took_s)
    return 1000 * (statistics.median(took[by_peer]) - statistics.median(took[direct]))


class Asking:
    """One connection that asks the same again and again."""

    def __init__(self, device: Device, row: np.ndarray) -> None:
        self._connection = http.client.HTTPConnection(*device.worker.address, timeout=30)
        body, length = request(row)
        self._body, self._headers = body, {"Inference-Header-Content-Length": str(length)}

    def seconds(self) -> float:
        began = time.perf_counter()
        self._connection.request("POST", "/v2/models/slow/infer", self._body, self._headers)
        response = self._connection.getresponse()
        response.read()
        assert response.status == 200, response.status
        return time.perf_counter() - began


def unaffected(checks: Checks, folder: Path, *, seconds: float) -> None:
    """What a device that is not over its bound notices of it: nothing, one ought to think."""
    lan = Lan(folder)
    try:
        one, two = lan.device("one"), lan.device("two")
        for device in (one, two):
            device.serve(0.0)
        ask = oip_request("slow", np.ones((1, 8), np.float32))
        medians: dict[bool, list[float]] = {False: [], True: []}
        for on in (False, True, False, True):
            one.told(*((two,) if on else ()))
            closed_loop(one.worker.address, ask, clients=1, seconds=0.2)
            medians[on].append(statistics.median(closed_loop(one.worker.address, ask, clients=1, seconds=seconds)))
        checks.at_most(
            "latency with a peer to ask, where there is room, times without",
            min(medians[True]) / min(medians[False]),
            1.05,
        )
    finally:
        lan.end()


if __name__ == "__main__":
    main()
