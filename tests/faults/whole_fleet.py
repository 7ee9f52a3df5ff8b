"""Rows of `make faults` with a real server, broker and agent, one of which is killed at a moment left to chance."""

from __future__ import annotations

import atexit
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np

from tests.fleet import LocalFleet, wait_until, write_classifier

CASES = 10
HIDDEN = 1200  # 6 MB: some time on the wire
ROW = np.eye(8, dtype=np.float32)[1:2]


@cache
def the_fleet() -> LocalFleet:
    """A device that serves m@0, and two more versions; it ends with the run."""
    fleet = LocalFleet(Path(tempfile.mkdtemp(prefix="shoal-faults-")), external_broker=True)
    atexit.register(fleet.stop)
    fleet.start_broker()
    start_server(fleet)
    fleet.start_agent("dev-1")
    fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
    wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"]])
    for version in range(3):
        write_classifier(fleet.folder / f"{version}.onnx", seed=version, hidden=HIDDEN)
        fleet.push("m", str(version), fleet.folder / f"{version}.onnx")
        assert fleet.build(f"m@{version}", "any")[0]["state"] == "ready"
    first = fleet.rollout("m@0")
    wait_until("m@0", lambda: fleet.rollout_state(first) == "succeeded")
    return fleet


def start_server(fleet: LocalFleet) -> None:
    """It makes differences between versions too."""
    fleet.start_server(SHOAL_DELTAS="true")


def killed(victim: str, seed: int) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """SIGKILL at some moment of a rollout."""
    chance = random.Random(f"{victim}.{seed}")
    for number in range(CASES):
        delay = chance.uniform(0.0, 2.0)
        yield f"{victim} after {delay:.2f} s", partial(_lives_through, victim, delay, str(1 + number % 2))


def _lives_through(victim: str, delay: float, version: str) -> str | None:
    fleet = the_fleet()
    starts: dict[str, Callable[[], None]] = {
        "server": lambda: start_server(fleet),
        "broker": fleet.start_broker,
        "dev-1": lambda: fleet.start_agent("dev-1"),
    }
    try:
        rollout = fleet.rollout(f"m@{version}", on_busy="supersede")
        time.sleep(delay)
        fleet.kill(victim)
        if victim != "dev-1":
            fleet.infer("dev-1", "m", ROW)  # a device needs neither to answer
        starts[victim]()
        wait_until(f"m@{version}", lambda: fleet.rollout_state(rollout) == "succeeded", 180)
        wait_until("its word", lambda: [d["version"] for d in fleet.get("/devices/dev-1")["serving"]] == [version], 60)
        answer = fleet.infer("dev-1", "m", ROW)
    except AssertionError as error:
        return str(error)[:500]
    right = answer["model_version"] == version and int(np.argmax(answer["outputs"][0]["data"])) == 1
    return None if right else f"it answers with {answer['model_version']}"


ROWS: dict[str, Callable[[int], Iterator[tuple[str, Callable[[], str | None]]]]] = {
    "server killed": partial(killed, "server"),
    "broker killed": partial(killed, "broker"),
    "whole agent killed": partial(killed, "dev-1"),
}
