"""What the agent and the server started is killed under their hands: both go on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from tests.fleet import LocalFleet, wait_until, write_classifier
from tests.processes import descendants

ROW = np.eye(8, dtype=np.float32)[:1]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A device that serves m@1, a ready m@2, and a long probation."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server(SHOAL_PROBATION_S="4")
        fleet.start_agent("dev-1")
        fleet.post("/profiles", {"name": "any", "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"]])
        for version in ("1", "2"):
            write_classifier(fleet.folder / f"{version}.onnx", seed=int(version))
            fleet.push("m", version, fleet.folder / f"{version}.onnx")
            assert fleet.build(f"m@{version}", "any")[0]["state"] == "ready"
        first = fleet.rollout("m@1")
        wait_until("m@1", lambda: fleet.rollout_state(first) == "succeeded")
        yield fleet
    finally:
        fleet.stop()


def child(fleet: LocalFleet, parent: str, words: str) -> psutil.Process:
    return descendants(fleet.processes[parent].pid, words)[0]


def version_that_answers(fleet: LocalFleet) -> str | None:
    try:
        return str(fleet.infer("dev-1", "m", ROW)["model_version"])
    except (AssertionError, httpx.HTTPError):
        return None


def test_a_killed_worker_is_back_with_its_model(fleet: LocalFleet) -> None:
    worker = child(fleet, "dev-1", "agent.serving.worker")
    worker.kill()
    wait_until("the worker's end", lambda: not worker.is_running())
    wait_until("an answer", lambda: version_that_answers(fleet) == "1", 30)
    assert child(fleet, "dev-1", "agent.serving.worker").pid != worker.pid
    (problem,) = wait_until("its word", lambda: fleet.get("/devices/dev-1")["problems"])
    assert problem["code"] == "worker_ended"
    assert "signal 9" in problem["detail"]


class Asking:
    """Clients that ask all the time, each by a connection that it keeps as long as it can."""

    def __init__(self, port: int, clients: int = 4) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self._stop = threading.Event()
        self.statuses: Counter[int] = Counter()
        self.cut: Counter[str] = Counter()  # by what the transport said
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for one in self._threads:
            one.start()

    def _ask(self) -> None:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 8], "data": ROW.tolist()}
        with httpx.Client(base_url=self._base, timeout=60) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post("/v2/models/m/infer", json={"inputs": [tensor]})
                    self.statuses[answer.status_code] += 1
                    assert answer.status_code == 200 or answer.headers["Retry-After"] == "1"
                except httpx.TransportError as error:
                    self.cut[type(error).__name__] += 1

    def end(self) -> None:
        self._stop.set()
        for one in self._threads:
            one.join()


def kill(worker: psutil.Process) -> None:
    worker.kill()


def crash(worker: psutil.Process) -> None:
    worker.send_signal(signal.SIGSEGV)


def run_out_of_memory(worker: psutil.Process) -> None:
    """Let the kernel end it, as it does when a control group has no more memory."""
    with memory_group() as (group, limit):
        limit.write_text(str(2 * 2**20))
        (group / "cgroup.procs").write_text(str(worker.pid))
        rows = np.zeros((20_000, 8), np.float32)  # as JSON; it is more than there is
        tensor = {"name": "x", "datatype": "FP32", "shape": list(rows.shape), "data": rows.flatten().tolist()}
        (connection,) = [one for one in worker.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        with contextlib.suppress(httpx.TransportError):
            for _ in range(100):
                url = f"http://127.0.0.1:{connection.laddr.port}/v2/models/m/infer"
                httpx.post(url, json={"inputs": [tensor]}, timeout=60)
        wait_until("the kernel", lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


@contextlib.contextmanager
def memory_group() -> Iterator[tuple[Path, Path]]:
    """A control group below this process's own, and the file of its memory limit; skips where there can be none."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = {
        **{Path("/sys/fs/cgroup") / own.lstrip("/"): "memory.max" for _, kind, own in lines if not kind},
        **{
            Path("/sys/fs/cgroup/memory") / own.lstrip("/"): "memory.limit_in_bytes"
            for _, kind, own in lines
            if kind == "memory"
        },
    }
    for parent, limit in places.items():
        group = parent / f"shoal-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                yield group, group / limit
                return
        finally:
            with contextlib.suppress(OSError):
                wait_until("the group to be empty", lambda found=group: not (found / "cgroup.procs").read_text(), 10)
            group.rmdir()
    pytest.skip("no control group for memory can be made here")


@pytest.mark.parametrize("end", [kill, crash, run_out_of_memory])
def test_clients_of_a_worker_that_dies_may_try_again_and_none_is_turned_away(
    fleet: LocalFleet, end: Callable[[psutil.Process], None]
) -> None:
    worker = child(fleet, "dev-1", "agent.serving.worker")
    asking = Asking(fleet.agent_ports["dev-1"])
    try:
        wait_until("answers", lambda: asking.statuses[200] > 100)
        end(worker)
        wait_until("its end", lambda: not worker.is_running())
        before = asking.statuses[200]
        wait_until("more answers", lambda: asking.statuses[200] > before + 100, 30)
    finally:
        asking.end()
    assert set(asking.statuses) <= {200, 503}
    assert set(asking.cut) <= {"ReadError", "WriteError", "RemoteProtocolError"}, "never refused: the agent listens on"
    assert 1 <= sum(asking.cut.values()) <= 4, "each client lost what it had asked, and no more"


def test_a_version_whose_worker_dies_while_it_is_watched_is_taken_back(fleet: LocalFleet) -> None:
    rollout = fleet.rollout("m@2", strategy={"stages": [{"percent": 100}], "stop_when": []})
    wait_until("probation", lambda: version_that_answers(fleet) == "2")
    child(fleet, "dev-1", "agent.serving.worker").kill()
    wait_until("m@1 back", lambda: version_that_answers(fleet) == "1", 30)
    deployment = wait_until(
        "the report", lambda: [d for d in fleet.deployments(rollout) if d["phase"] == "rolled_back"]
    )[0]
    assert deployment["failure"]["code"] == "worker_crashed"
    serving = fleet.get("/devices/dev-1")["serving"]
    assert [one["version"] for one in serving] == ["1"]
    assert wait_until(
        "its end", lambda: fleet.rollout_state(rollout) != "running" and fleet.rollout_state(rollout)
    ) in {
        "stopped",
        "reverted",
    }


def test_an_artifact_that_was_damaged_on_the_disk_is_fetched_again(fleet: LocalFleet) -> None:
    fleet.kill("dev-1")
    artifacts = [path for path in (fleet.folder / "dev-1" / "artifacts").iterdir() if path.is_file()]
    for path in artifacts:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    fleet.start_agent("dev-1")
    wait_until("m@1 again", lambda: version_that_answers(fleet) == "1", 30)
    assert artifacts


def test_a_killed_broker_is_started_again_and_devices_come_back(fleet: LocalFleet, tmp_path: Path) -> None:
    child(fleet, "server", "mosquitto").kill()
    write_classifier(tmp_path / "model.onnx", seed=3)
    fleet.push("n", "1", tmp_path / "model.onnx")
    assert fleet.build("n@1", "any")[0]["state"] == "ready"
    rollout = fleet.rollout("n@1")
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    assert fleet.get("/devices/dev-1")["online"]
