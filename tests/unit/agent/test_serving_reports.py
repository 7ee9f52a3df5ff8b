"""What is reported as serving follows what the worker was told, however late it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from agent.condition import Condition
from agent.inference import Inference
from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.serving.ipc import Activate, Activated, Loaded, Unload
from agent.telemetry.spool import Spool
from agent.update.journal import Journal
from agent.update.lastgood import LastGood
from agent.update.store import ArtifactStore
from agent.update.updater import Record, Updater
from agent.worker_process import WorkerProcess


class SlowWorker:
    """Keeps what it is told, and answers when the test does."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def send(self, message: Any) -> bool:
        self.told.append(message)
        return True


def record(key: str, digest: str) -> Record:
    tensor = (TensorSpec("x", "float32", (-1, 2)),)
    kind = (ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32)
    manifest = Manifest(digest * 64, 10, 10, "m", key, f"m-{key}", "p", *kind, tensor, tensor)
    return Record(key, manifest, 1.0, 60.0, phase=Phase.ACTIVE)


@pytest.fixture
def worker() -> SlowWorker:
    return SlowWorker()


@pytest.fixture
def inference(tmp_path: Path, worker: SlowWorker) -> Inference:
    records = {one.deployment_id: one for one in (record("1", "a"), record("2", "b"))}
    found = Inference(
        cast(WorkerProcess, worker),
        ArtifactStore(tmp_path / "artifacts"),
        Updater(records, 1),
        LastGood(tmp_path / "serving.json"),
        Condition(Journal(tmp_path / "journal.db"), Spool(tmp_path / "spool.db"), "", "state"),
        carry_out=lambda effects: None,
        changed=lambda: None,
        switched=lambda deployment: None,
        window=lambda window, since: None,
        hang_s=0.0,
    )
    found.take_over({1: "1", 2: "2"})
    for request in (1, 2):
        found.said(Loaded(request, "onnx", "cpu", 0.1))
    return found


def answer(inference: Inference, worker: SlowWorker) -> None:
    """Everything that the worker was told to activate, it has."""
    for message in worker.told:
        if isinstance(message, Activate):
            inference.said(Activated(message.request_id, True))


def serving(inference: Inference) -> list[str]:
    return [one.version for one in inference.serving]


def test_what_is_taken_off_before_the_worker_says_that_it_serves_is_not_said_to_serve(
    inference: Inference, worker: SlowWorker
) -> None:
    inference.activate(record("1", "a"))
    inference.unload("m", "a" * 64)
    assert worker.told[-1] == Unload("m", "a" * 64)
    answer(inference, worker)
    assert serving(inference) == []


def test_the_version_before_is_said_to_serve_until_the_next_one_does(inference: Inference, worker: SlowWorker) -> None:
    inference.activate(record("1", "a"))
    answer(inference, worker)
    inference.activate(record("2", "b"))
    inference.unload("m", "a" * 64)
    assert serving(inference) == ["1"]
    answer(inference, worker)
    assert serving(inference) == ["2"]
