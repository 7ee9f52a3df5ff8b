"""The worker's local inference API with the real tritonclient, and hot swaps under load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.serving.framing import FrameChannel
from agent.serving.ipc import Collect, Unload, Window
from tests.fleet import write_classifier
from tests.serving_worker import serve, start_worker

ROW = np.array([[0.1, 0.9, 0.2, 0, 0, 0, 0, 0]], np.float32)


def manifest(digest: str, version: str) -> Manifest:
    return Manifest(
        digest * 64, 10, 4, "tri", version, "v", "p", ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32,
        (TensorSpec("x", "float32", (-1, 8)),), (TensorSpec("scores", "float32", (-1, 3)),), max_batch=8,
    )  # fmt: skip


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[FrameChannel, str, Path]]:
    """A worker with `tri` version 1 active: its channel, its address, and the model file."""
    write_classifier(tmp_path / "model")
    found = start_worker()
    channel = found.channel
    try:
        load(channel, tmp_path / "model", "a", "1")
        yield channel, found.url.removeprefix("http://"), tmp_path / "model"
    finally:
        channel.close()
        assert found.process.wait(20) == 0


def load(channel: FrameChannel, path: Path, digest: str, version: str) -> None:
    assert serve(channel, manifest(digest, version), path).provider == "cpu"


def infer(client: triton.InferenceServerClient, *, binary: bool) -> triton.InferResult:
    tensor = triton.InferInput("x", list(ROW.shape), "FP32")
    tensor.set_data_from_numpy(ROW, binary_data=binary)
    return client.infer("tri", [tensor], outputs=[triton.InferRequestedOutput("scores", binary_data=binary)])


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_works_unchanged(worker: tuple[FrameChannel, str, Path], binary: bool) -> None:
    client = triton.InferenceServerClient(worker[1])
    assert client.is_server_live()
    assert client.is_model_ready("tri")
    assert not client.is_model_ready("nobody")
    assert client.get_model_metadata("tri")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 8]}]
    assert infer(client, binary=binary).as_numpy("scores").argmax() == 1
    wrong = triton.InferInput("x", [1, 7], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 7), np.float32))
    with pytest.raises(InferenceServerException, match=r"shape \[1, 7\], the model takes \[-1, 8\]"):
        client.infer("tri", [wrong])
    client.close()


def test_no_request_is_lost_over_swaps(worker: tuple[FrameChannel, str, Path]) -> None:
    channel, address, path = worker
    stop = threading.Event()
    answers: list[str] = []
    failures: list[Exception] = []

    def ask() -> None:
        client = triton.InferenceServerClient(address)
        while not stop.is_set():
            try:
                answers.append(infer(client, binary=True).get_response()["model_version"])
            except Exception as error:
                failures.append(error)
        client.close()

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for swap in range(20):
        new, old = ("b", "a") if swap % 2 == 0 else ("a", "b")
        load(channel, path, new, str(swap + 2))
        channel.send(Unload("tri", old * 64))
    stop.set()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert len(set(answers)) > 5
    channel.send(Collect(3))
    window = channel.receive()
    assert isinstance(window, Window)
    assert all(model.errors == 0 for model in window.models)
