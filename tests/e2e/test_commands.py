"""Commands, end to end: real server, broker and agents; each is killed while a command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from fleet_server.cli.main import app
from tests.cli import CliRunner, Result
from tests.fleet import BIN, LocalFleet, wait_until, write_classifier

ROW = np.eye(8, dtype=np.float32)[:1]
ENDED = {"succeeded", "failed", "timed_out", "cancelled", "refused"}
CODE = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).open('a').write('x'); time.sleep(float(sys.argv[2]))"
PROGRAM = [sys.executable, "-c", CODE]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"), external_broker=True)
    try:
        fleet.start_broker()
        fleet.start_server()
        program = [*PROGRAM, str(fleet.folder / "blinked"), "2.5"]
        fleet.start_agent("cam-1", tables=f"[commands]\nidentify_program = {json.dumps(program)}\n")
        fleet.start_agent("cam-2", tables="[commands]\nlogs = false\n")
        fleet.post("/profiles", {"name": "edge", "runtime": "onnx", "precisions": ["fp32"]})
        for device in ("cam-1", "cam-2"):
            wait_until("the device", lambda device=device: fleet.api.get(f"/devices/{device}").status_code == 200)
        path = fleet.folder / "m.onnx"
        write_classifier(path)
        fleet.push("m", "1", path)
        fleet.build("m@1", "edge")
        rollout = fleet.rollout("m@1")
        wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
        yield fleet
    finally:
        fleet.stop()


def shoal(fleet: LocalFleet, *arguments: str) -> Result:
    environment = {"SHOAL_URL": fleet.url, "SHOAL_TOKEN": fleet.token, "COLUMNS": "160", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, arguments, env=environment)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def ask(fleet: LocalFleet, device: str, kind: str, **fields: Any) -> str:
    return str(fleet.post(f"/devices/{device}/commands", {"kind": kind, **fields})["id"])


def state(fleet: LocalFleet, command: str) -> str:
    return str(fleet.get(f"/commands/{command}")["state"])


def ended(fleet: LocalFleet, command: str, seconds: float = 90.0) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        found: dict[str, Any] = fleet.get(f"/commands/{command}")
        return found if found["state"] in ENDED else None

    return wait_until("the command", over, seconds)


def start_again(fleet: LocalFleet, device: str) -> None:
    fleet.start_agent(device)
    wait_until("the device", lambda: fleet.get(f"/devices/{device}")["online"])


def test_a_runtime_is_restarted_while_programs_ask_it(fleet: LocalFleet) -> None:
    stop, answers = threading.Event(), []

    def ask_it() -> None:
        while not stop.is_set():
            answers.append(fleet.infer("cam-1", "m", ROW))

    thread = threading.Thread(target=ask_it)
    thread.start()
    done = shoal(fleet, "device", "restart-runtime", "cam-1", "-o", "json")
    stop.set()
    thread.join()
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["state"], found["result"]["models"]) == ("succeeded", ["m"])
    assert found["result"]["took_s"] > 0
    assert len(answers) > 5
    actions = [one["action"] for one in fleet.get("/audit-events", limit=200)["items"]]
    assert {"command.create", "command.finish"} <= set(actions)


def test_a_log_is_followed_until_somebody_presses_ctrl_c(fleet: LocalFleet) -> None:
    environment = {**os.environ, "SHOAL_URL": fleet.url, "SHOAL_TOKEN": fleet.token}
    command = [str(BIN / "shoal"), "device", "logs", "cam-1", "-f", "--lines", "500", "-o", "json"]
    # Also where whoever runs the tests does not hear it (a job in the background of a shell), which children inherit.
    command = ["env", "--default-signal=INT", *command]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shown = []
        for row in process.stdout:
            shown.append(json.loads(row))
            if "IDENTIFY" in shown[-1]["text"]:
                process.send_signal(signal.SIGINT)
                break
            if len(shown) == 1:
                ask(fleet, "cam-1", "identify")
        assert process.wait(30) == 0
    sequences = [one["sequence"] for one in shown]
    assert sequences == sorted(set(sequences))
    assert {one["source"] for one in shown} <= {"agent", "worker"}
    newest = fleet.get("/commands", kind="logs", limit=1)["items"][0]
    assert newest["state"] == "cancelled"
    plain = shoal(fleet, "device", "logs", "cam-1", "--lines", "3")
    assert plain.exit_code == 0
    assert 1 <= len(plain.stdout.splitlines()) <= 3
    again = shoal(fleet, "command", "logs", newest["id"], "-o", "json")
    assert [json.loads(row)["sequence"] for row in again.stdout.splitlines()][: len(shown)] == sequences
    refused = shoal(fleet, "device", "logs", "cam-2")
    assert refused.exit_code == 5
    assert "commands.logs = false" in refused.stderr
    wait_until("the program's end", lambda: not fleet.get("/commands", state="running")["items"])


def test_models_are_benchmarked_facts_measured_and_a_device_watched(fleet: LocalFleet) -> None:
    done = shoal(fleet, "device", "benchmark", "cam-2", "--seconds", "0.3")
    assert done.exit_code == 0, done.output
    assert "m@1" in done.stdout
    done = shoal(fleet, "device", "measure", "cam-2", "-o", "json")
    assert json.loads(done.stdout)["state"] == "succeeded"
    for _ in range(5):
        fleet.infer("cam-2", "m", ROW)

    def counted() -> dict[str, Any] | None:
        found: dict[str, Any] = json.loads(shoal(fleet, "device", "top", "cam-2", "-o", "json").stdout)
        return found if found["models"][0]["requests"] >= 5 else None

    found = wait_until("telemetry", counted)
    assert (found["models"][0]["model"], found["models"][0]["errors"]) == ("m", 0)
    assert found["models"][0]["latency_p50_ms"] > 0
    assert found["host"]["memory_used_mb"] > 0
    shown = shoal(fleet, "device", "top", "cam-2", "--once")
    assert "m@1" in shown.stdout
    assert "online" in shown.stdout
    several = shoal(fleet, "command", "send", "logs", "--query", "id==cam-*", "--wait", "-o", "json")
    assert several.exit_code == 1
    assert {one["device_id"]: one["state"] for one in json.loads(several.stdout)} == {
        "cam-1": "succeeded", "cam-2": "refused",
    }  # fmt: skip


def test_an_agent_that_is_killed_does_not_do_it_twice(fleet: LocalFleet) -> None:
    blinked = fleet.folder / "blinked"
    blinked.write_text("")
    command = ask(fleet, "cam-1", "identify", timeout_s=120)
    wait_until("its begin", lambda: blinked.read_text() == "x" and state(fleet, command) == "running")
    fleet.kill("cam-1")
    start_again(fleet, "cam-1")
    found = ended(fleet, command)
    assert (found["state"], found["code"]) == ("failed", "interrupted")
    time.sleep(1.0)
    assert blinked.read_text() == "x"


def test_one_that_is_away_is_asked_when_it_comes_or_not_at_all(fleet: LocalFleet) -> None:
    fleet.kill("cam-1")
    wait_until("its absence", lambda: not fleet.get("/devices/cam-1")["online"])
    late, kept = ask(fleet, "cam-1", "identify", timeout_s=1.0), ask(fleet, "cam-1", "restart-runtime", timeout_s=300)
    assert (ended(fleet, late)["state"], state(fleet, kept)) == ("timed_out", "queued")
    before = (fleet.folder / "blinked").read_text()
    start_again(fleet, "cam-1")
    found = ended(fleet, kept)
    assert found["state"] == "succeeded", found
    assert (fleet.folder / "blinked").read_text() == before


def test_server_and_broker_may_die_while_a_command_goes_on(fleet: LocalFleet) -> None:
    command = ask(fleet, "cam-1", "benchmark", seconds=2.0, timeout_s=120)
    wait_until("its begin", lambda: state(fleet, command) == "running")
    fleet.kill("server")
    fleet.kill("broker")
    time.sleep(3.0)  # it is over by then, and there is nobody to be told
    fleet.start_broker()
    fleet.start_server()
    found = ended(fleet, command, 120)
    assert found["state"] == "succeeded", found
    assert found["result"]["benchmarks"][0]["runs"] >= 20
    assert httpx.get(f"http://127.0.0.1:{fleet.agent_ports['cam-1']}/v2/health/live").status_code == 200
