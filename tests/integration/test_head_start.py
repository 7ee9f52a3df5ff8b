"""A worker that is started before anything is known, and answers before there is a supervisor."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import httpx
import msgspec
import pytest

from agent.config import Config
from agent.head_start import spawn, spawn_for
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import Manifest
from agent.resuming import Resumed, resume
from agent.serving.ipc import Loaded, Ready
from agent.update.journal import Journal
from agent.update.updater import Record
from tests.fleet import free_port
from tests.serving_worker import write_echo

ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, -2.0]}]}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config("dev", tmp_path / "state", listen=f"127.0.0.1:{free_port()}")


def lies_there(config: Config, name: str, phase: Phase, *, damaged: bool = False) -> Manifest:
    """A deployment in the journal, and its artifact."""
    (config.state_dir / "artifacts").mkdir(parents=True, exist_ok=True)
    path = config.state_dir / name
    manifest = write_echo(path, "float32", 2)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    manifest = msgspec.structs.replace(manifest, model=name, digest=digest, size=len(content))
    path.rename(config.state_dir / "artifacts" / digest)
    if damaged:
        (config.state_dir / "artifacts" / digest).write_bytes(content[:-1] + b"\0")
    journal = Journal(config.state_dir / "journal.db")
    journal.save({name: Record(name, manifest, probation_s=0, deadline_s=60, phase=phase)})
    journal.close()
    return manifest


def ended(resumed: Resumed) -> None:
    resumed.worker.stop()
    resumed.files.journal.close()


def ask(config: Config, model: str) -> httpx.Response:
    return httpx.post(f"http://{config.listen}/v2/models/{model}/infer", json=ROW, timeout=30)


def test_what_was_active_answers_with_nobody_there_to_say_so(config: Config) -> None:
    lies_there(config, "echo", Phase.ACTIVE)
    resumed = resume(config, spawn_for(["run", "--config", "x"]))
    try:
        answer = ask(config, "echo")
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][0]["data"] == [1.5, -2.0]
        assert resumed.loads == {1: "echo"}
        said = [resumed.events.get(timeout=10)[1] for _ in range(2)]
        assert isinstance(said[0], Ready)
        assert isinstance(said[1], Loaded)
        assert said[1].code is None
    finally:
        ended(resumed)


@pytest.mark.parametrize(("phase", "damaged"), [(Phase.ACTIVE, True), (Phase.PROBATION, False), (Phase.FAILED, False)])
def test_what_is_damaged_or_was_not_proven_is_not_loaded_by_itself(config: Config, phase: Phase, damaged: bool) -> None:
    manifest = lies_there(config, "echo", phase, damaged=damaged)
    resumed = resume(config, spawn_for([]))
    try:
        assert resumed.loads == {}
        assert isinstance(resumed.events.get(timeout=30)[1], Ready)
        assert ask(config, "echo").status_code == (503 if phase is Phase.ACTIVE else 404)
        assert resumed.files.store.has(manifest.digest) != damaged
    finally:
        ended(resumed)


def test_an_address_that_is_taken_is_left_to_the_supervisor_to_say(config: Config) -> None:
    host, _, port = config.listen.rpartition(":")
    with socket.create_server((host, int(port))):
        resumed = resume(config, spawn())
        assert resumed.loads is None
    ended(resumed)


def test_a_worker_that_is_told_nothing_ends_with_the_stream() -> None:
    spawned = spawn()
    os.close(spawned.descriptor)
    assert spawned.end(30) == 0


def test_a_worker_that_does_not_end_is_killed() -> None:
    spawned = spawn()
    assert spawned.end(0) == -9
    spawned.kill()
    os.close(spawned.descriptor)


@pytest.mark.parametrize(
    "arguments", [["facts"], ["enroll", "--server", "x"], ["--help"], ["run", "-h"], ["--version"]]
)
def test_commands_that_run_no_daemon_start_no_worker(arguments: list[str]) -> None:
    assert spawn_for(arguments) is None
