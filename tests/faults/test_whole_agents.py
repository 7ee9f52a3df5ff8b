"""Whole agents, beside a real server and broker: killed at dealings with the disk, and on a network that is bad.

Somebody asks the device all the time: once it answers it must go on answering, rightly, for as long as it lives.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier
from tests.forked import ForkedServer
from tests.proxy import BadNetwork

ROW = np.eye(8, dtype=np.float32)[1:2]
FEW, MANY = 2, 40  # points
POINTS = 60  # that a deployment has, about
PF_EXITING = 4  # of Linux's flags of a process


def ends(process: subprocess.Popen[bytes] | ForkedServer) -> bool:
    """Whether a process is over, or is about to be: one that is killed lets go of its worker before it is over."""
    if process.poll() is not None:
        return True
    try:
        state, *numbers = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()  # after its name
    except OSError:
        return True
    return state in "ZX" or bool(int(numbers[5]) & PF_EXITING)


class Observer:
    """Asks a device again and again."""

    def __init__(self, fleet: LocalFleet, name: str) -> None:
        self._fleet, self._name = fleet, name
        self._stop = threading.Event()
        self.answers = 0
        self.wrong: list[str] = []
        self._process = 0  # that has answered
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)

    def _ask(self) -> None:
        while not self._stop.wait(0.03):
            process = self._fleet.processes.get(self._name)
            pid = process.pid if process is not None and process.poll() is None else 0
            try:
                scores = self._fleet.infer(self._name, "m", ROW)["outputs"][0]["data"]
            except (httpx.HTTPError, AssertionError) as error:
                still = self._fleet.processes.get(self._name)
                if pid and self._process == pid and still is not None and still.pid == pid and not ends(still):
                    self.wrong.append(
                        f"{time.strftime('%H:%M:%S')} it answered before, lives, and does not answer: {error}"
                    )
                continue
            self._process = pid
            self.answers += 1
            if int(np.argmax(scores)) != 1:
                self.wrong.append(f"a wrong answer: {scores}")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A device that serves m@0, and two more versions."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server(SHOAL_DELTAS="true")
        fleet.start_agent("dev-1")
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"]])
        for version in range(3):
            write_classifier(fleet.folder / f"{version}.onnx", seed=version, hidden=300)
            fleet.push("m", str(version), fleet.folder / f"{version}.onnx")
            assert fleet.build(f"m@{version}", "any")[0]["state"] == "ready"
        first = fleet.rollout("m@0")
        wait_until("m@0", lambda: fleet.rollout_state(first) == "succeeded")
        yield fleet
    finally:
        fleet.stop()


def answers(fleet: LocalFleet) -> bool:
    """Whether anybody does, at the device's local API."""
    try:
        httpx.get(f"http://127.0.0.1:{fleet.agent_ports['dev-1']}/v2/health/live")
    except httpx.TransportError:
        return False
    return True


def first_answer(fleet: LocalFleet) -> dict[str, Any] | None:
    """What the model answers; None where the device does not serve it yet."""
    try:
        return fleet.infer("dev-1", "m", ROW)
    except (httpx.TransportError, AssertionError):
        return None


def nobody_answers(fleet: LocalFleet) -> None:
    """Wait for the end of a killed agent's worker: its last answers are not those of the next agent."""
    wait_until("the worker's end", lambda: not answers(fleet), 30)


def lives_through(fleet: LocalFleet, point: int, side: str, version: str) -> None:
    """A rollout while the agent is killed at a point; then it is started again."""
    fleet.kill("dev-1")
    nobody_answers(fleet)
    fleet.start_agent("dev-1", program=(sys.executable, "-m", "tests.faults.run_agent", str(point), side))
    rollout = fleet.rollout(f"m@{version}", on_busy="supersede")
    killed = fleet.processes["dev-1"]
    wait_until(
        "the kill, or the end", lambda: killed.poll() is not None or fleet.rollout_state(rollout) == "succeeded", 120
    )
    if killed.poll() is not None:
        assert killed.returncode == -9, fleet.log("dev-1")[-3000:]
        nobody_answers(fleet)
        fleet.start_agent("dev-1")
    wait_until(f"m@{version}", lambda: fleet.rollout_state(rollout) == "succeeded", 120)
    if fleet.processes["dev-1"] is killed:  # it was done before it came to that point, and might come to it yet
        fleet.kill("dev-1")
        nobody_answers(fleet)
        fleet.start_agent("dev-1")
        wait_until("an answer", lambda: answers(fleet), 30)
    # It may have been killed just after the end: then it says anew what serves.
    wait_until("its word", lambda: [one["version"] for one in fleet.get("/devices/dev-1")["serving"]] == [version], 30)
    # That may be the word of the one before, as its killed process had given it: the next one may only begin.
    assert wait_until("an answer", lambda: first_answer(fleet), 30)["model_version"] == version


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_whole_agent_is_killed_at_its_dealings_with_the_disk(fleet: LocalFleet, count: int) -> None:
    chance = random.Random(count)
    observer = Observer(fleet, "dev-1")
    try:
        for number in range(count):
            point = (number * POINTS + POINTS // 2) // count
            lives_through(fleet, point, chance.choice(["before", "after"]), str(1 + number % 2))
    finally:
        observer.stop()
    assert observer.wrong == [], fleet.log("dev-1")
    assert observer.answers > count


def test_a_bad_network_delays_a_deployment_and_breaks_nothing(fleet: LocalFleet, tmp_path: Path) -> None:
    network = BadNetwork(fleet.broker_port, seed=3, cut_after_s=(0.3, 2.5))
    try:
        fleet.start_agent("dev-2", broker_port=network.port)
        wait_until(
            "the device", lambda: [d for d in fleet.get("/devices")["items"] if d["id"] == "dev-2" and d["profile"]]
        )
        rollout = fleet.rollout("m@0", target={"devices": ["dev-2"]})
        started = time.monotonic()
        wait_until("a first answer, or half a minute", lambda: time.monotonic() - started > 30 or network.cuts >= 3, 60)
        wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded", 150)
        assert network.cuts >= 1
        assert fleet.infer("dev-2", "m", ROW)["model_version"] == "0"
    finally:
        network.stop()
