"""Ensembles on a real worker, by `tritonclient` and plain HTTP: graphs of real ONNX models, exchanged under load."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import tritonclient.http as triton
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from agent.protocol.lifecycle import Phase
from agent.protocol.manifest import Manifest, Scheduling, TensorSpec
from agent.protocol.messages import Exposure, ExposureMode
from agent.serving.ensemble_config import EnsembleConfig, StepConfig
from agent.serving.framing import FrameChannel
from agent.serving.ipc import (
    Activate,
    Activated,
    Collect,
    Declare,
    Expect,
    Expose,
    Exposed,
    FromWorker,
    Load,
    Loaded,
    Shutdown,
    Unload,
    Unservable,
    Window,
)
from tests.fleet import wait_until, write_classifier
from tests.real_device import RealDevice
from tests.serving_worker import described, running_worker, write, write_sums

PAIR = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
# x doubled and x tripled, at once; then their sum and difference.
DIAMOND = EnsembleConfig(
    "diamond",
    ("in",),
    ("total", "apart"),
    (
        StepConfig("join", "sums", {"a": "left", "b": "right"}, {"sum": "total", "difference": "apart"}),
        StepConfig("one", "double", {"x": "in"}, {"y": "left"}),
        StepConfig("two", "triple", {"x": "in"}, {"y": "right"}),
    ),
)
# The same model twice: what it gives is a square where both steps ask the same version.
TWICE = EnsembleConfig(
    "twice",
    ("in",),
    ("out",),
    (
        StepConfig("first", "double", {"x": "in"}, {"y": "mid"}),
        StepConfig("second", "double", {"x": "mid"}, {"y": "out"}),
    ),
)


def write_scale(path: Path, name: str, factor: float, version: str = "1", **more: Any) -> Manifest:
    """A model that multiplies by a number."""
    value = helper.make_tensor_value_info
    constant = helper.make_tensor("k", TensorProto.FLOAT, [1], [factor])
    write(
        path,
        [helper.make_node("Constant", [], ["k"], value=constant), helper.make_node("Mul", ["x", "k"], ["y"])],
        [value("x", TensorProto.FLOAT, ["rows", 2])],
        [value("y", TensorProto.FLOAT, ["rows", 2])],
    )
    digest = f"{int(factor * 16):064x}"
    return described(name, PAIR[:1], PAIR[1:], version=version, digest=digest, **more)


@dataclass
class Device:
    """A worker, and what it says."""

    channel: FrameChannel
    url: str
    folder: Path
    said: list[FromWorker] = field(default_factory=list)
    sent: int = 100

    def declare(self, *ensembles: EnsembleConfig) -> dict[str, str]:
        self.channel.send(Declare(ensembles))
        return self.unservable()

    def unservable(self) -> dict[str, str]:
        found = self.channel.receive()
        while not isinstance(found, Unservable):
            assert found is not None
            self.said.append(found)
            found = self.channel.receive()
        return found.ensembles

    def ask(self, message: Any, kind: type) -> Any:
        """Send something, and wait for its answer; what else is said meanwhile is kept."""
        self.channel.send(message)
        while not isinstance(found := self.channel.receive(), kind):
            assert found is not None
            self.said.append(found)
        return found

    def scale(self, name: str, factor: float, version: str = "1", *, activate: bool = True, **more: Any) -> Manifest:
        path = self.folder / f"{name}-{version}"
        return self.load(write_scale(path, name, factor, version, **more), path, activate=activate)

    def load(self, manifest: Manifest, path: Path, *, activate: bool = True) -> Manifest:
        self.sent += 1
        loaded = self.ask(Load(self.sent, f"d-{manifest.version}", manifest, str(path)), Loaded)
        assert loaded.code is None, loaded.detail
        if activate:
            assert self.ask(Activate(self.sent, manifest.model, manifest.digest), Activated).ok
        return manifest

    def sums(self) -> Manifest:
        manifest = msgspec.structs.replace(write_sums(self.folder / "sums"), digest="c" * 64)
        return self.load(manifest, self.folder / "sums")

    def infer(self, name: str, rows: Any, **parameters: Any) -> httpx.Response:
        value = np.asarray(rows, np.float32)
        tensor = {"name": "in", "datatype": "FP32", "shape": list(value.shape), "data": value.reshape(-1).tolist()}
        body = {"id": "r1", "inputs": [tensor], "parameters": parameters}
        return httpx.post(f"{self.url}/v2/models/{name}/infer", json=body, timeout=30)

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """By deployment, requests, errors and refusals since the last time."""
        window: Window = self.ask(Collect(1), Window)
        return {one.deployment_id: (one.requests, one.errors, one.rejected) for one in window.models}


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with running_worker() as (channel, address, _):
        yield Device(channel, f"http://{address}", tmp_path)


def outputs(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {one["name"]: one["data"] for one in answer.json()["outputs"]}


def test_two_steps_are_asked_as_one_model(device: Device) -> None:
    device.scale("double", 2)
    assert device.declare(TWICE) == {}
    answer = device.infer("twice", [[1, 2], [3, 4]])
    assert outputs(answer) == {"out": [4.0, 8.0, 12.0, 16.0]}
    assert {key: answer.json()[key] for key in ("id", "model_name", "model_version")} == {
        "id": "r1", "model_name": "twice", "model_version": "1",
    }  # fmt: skip


def test_tritonclient_asks_a_diamond_and_reads_all_about_it(device: Device) -> None:
    device.scale("double", 2)
    device.scale("triple", 3)
    device.sums()
    assert device.declare(DIAMOND) == {}
    with contextlib.closing(triton.InferenceServerClient(device.url.removeprefix("http://"))) as client:
        assert client.is_model_ready("diamond")
        assert client.is_model_ready("diamond", "1")
        tensor = triton.InferInput("in", [1, 2], "FP32")
        tensor.set_data_from_numpy(np.array([[1, 2]], np.float32))
        result = client.infer("diamond", [tensor], priority=1, timeout=10_000_000)
        assert result.as_numpy("total").tolist() == [[5.0, 10.0]]
        assert result.as_numpy("apart").tolist() == [[-1.0, -2.0]]
        only = client.infer("diamond", [tensor], outputs=[triton.InferRequestedOutput("apart")])
        assert [one["name"] for one in only.get_response()["outputs"]] == ["apart"]

        metadata = client.get_model_metadata("diamond")
        assert metadata["platform"] == "ensemble"
        assert metadata["inputs"] == [{"name": "in", "datatype": "FP32", "shape": [-1, 2]}]
        assert [one["name"] for one in metadata["outputs"]] == ["total", "apart"]
        assert metadata["parameters"]["steps"] == ["join: sums@1", "one: double@1", "two: triple@1"]
        config = client.get_model_config("diamond")
        assert config["max_batch_size"] == 8
        step = config["ensemble_scheduling"]["step"][1]
        assert (step["model_name"], step["input_map"], step["output_map"]) == ("double", {"x": "in"}, {"y": "left"})

        (stats,) = client.get_inference_statistics("diamond")["model_stats"]
        assert (stats["name"], stats["inference_count"], stats["execution_count"]) == ("diamond", 2, 2)
        assert stats["inference_stats"]["fail"]["count"] == 0
        assert {one["name"] for one in client.get_inference_statistics()["model_stats"]} == {
            "double", "triple", "sums", "diamond",
        }  # fmt: skip
        index = {one["name"]: one for one in client.get_model_repository_index()}
        assert index["diamond"] == {"name": "diamond", "version": "1", "state": "READY", "reason": ""}
        client.load_model("diamond")
        with pytest.raises(InferenceServerException, match="declared in the agent's configuration"):
            client.unload_model("diamond")
        wrong = triton.InferInput("in", [1, 2], "INT64")
        wrong.set_data_from_numpy(np.array([[1, 2]], np.int64))
        with pytest.raises(InferenceServerException, match="takes FP32"):
            client.infer("diamond", [wrong])


def test_steps_that_need_nothing_of_each_other_run_at_once(device: Device) -> None:
    """Each waits half a second for company: one after the other they would take a second."""
    wait = Scheduling(batch_wait_ms=500)
    device.scale("double", 2, scheduling=wait)
    device.scale("triple", 3, scheduling=wait)
    device.sums()
    device.declare(DIAMOND)
    device.infer("diamond", [[1, 2]])
    stats = httpx.get(f"{device.url}/v2/models/stats").json()["model_stats"]
    took = {one["name"]: one["inference_stats"]["success"]["ns"] for one in stats}
    assert took["double"] >= 0.4e9
    assert took["triple"] >= 0.4e9
    assert took["diamond"] < took["double"] + took["triple"]


def test_a_missing_model_is_named_and_the_ensemble_is_there_when_it_comes(device: Device) -> None:
    device.scale("double", 2)
    device.scale("triple", 3)
    problems = device.declare(DIAMOND)
    assert problems == {"diamond": "no version of sums is loaded here: roll one out"}
    answer = device.infer("diamond", [[1, 2]])
    assert answer.status_code == 503
    assert "no version of sums is loaded here" in answer.json()["error"]
    assert answer.headers["Retry-After"] == "1"
    for path in ("", "/ready", "/config"):
        assert httpx.get(f"{device.url}/v2/models/diamond{path}").status_code == 503
    index = httpx.post(f"{device.url}/v2/repository/index", json={}).json()
    (entry,) = [one for one in index if one["name"] == "diamond"]
    assert (entry["state"], "sums" in entry["reason"]) == ("UNAVAILABLE", True)
    assert (
        httpx.get(f"{device.url}/v2/models/nobody").json()["error"].endswith("models that do: double, triple, diamond")
    )
    device.sums()
    assert device.unservable() == {}
    assert outputs(device.infer("diamond", [[1, 2]]))["total"] == [5.0, 10.0]
    device.channel.send(Unload("double", f"{32:064x}"))
    assert "no version of double" in device.unservable()["diamond"]
    assert device.infer("diamond", [[1, 2]]).status_code == 503


def test_models_that_do_not_fit_together_are_named(device: Device) -> None:
    device.scale("double", 2)
    device.scale("triple", 3)
    device.sums()
    wide = msgspec.structs.replace(
        described("triple", (PAIR[0],), (TensorSpec("y", "float32", (-1, 3)),), digest="d" * 64), version="2"
    )
    device.declare(DIAMOND)
    device.load(wide, device.folder / "triple-1")
    answer = device.infer("diamond", [[1, 2]])
    assert answer.status_code == 503
    assert "ensembles[diamond].steps[two].outputs.y (triple@2): 'right' is float32 [-1, 3]" in answer.json()["error"]
    assert "Retry-After" not in answer.headers


def test_a_model_wins_over_an_ensemble_of_its_name(device: Device) -> None:
    named = msgspec.structs.replace(TWICE, name="triple")
    device.scale("double", 2)
    assert device.declare(named) == {}
    device.channel.send(Expect(("triple",)))
    assert "give the ensemble another name" in device.unservable()["triple"]
    assert device.infer("triple", [[1, 2]]).status_code == 503
    device.scale("triple", 3)
    assert httpx.get(f"{device.url}/v2/models/triple").json()["platform"] == "onnx_fp32"


def test_an_error_names_the_step(device: Device) -> None:
    """A net whose declared free size it does not take."""
    device.scale("double", 2)
    free = described("triple", (TensorSpec("x", "float32", (-1, -1)),), (TensorSpec("y", "float32", (-1, -1)),))
    write_scale(device.folder / "net", "triple", 3)
    warmed = tuple(msgspec.structs.replace(one, example_shape=(1, 2)) for one in free.inputs)
    device.load(msgspec.structs.replace(free, inputs=warmed), device.folder / "net")
    chain = EnsembleConfig("chain", ("in",), ("out",), (StepConfig("only", "triple", {"x": "in"}, {"y": "out"}),))
    device.declare(chain)
    answer = device.infer("chain", [[1, 2, 3]])
    assert answer.status_code == 500
    assert answer.json()["error"].startswith("step 'only' (triple@1): the model failed: ")
    (stats,) = httpx.get(f"{device.url}/v2/models/chain/stats").json()["model_stats"]
    assert stats["inference_stats"]["fail"]["count"] == 1


def test_a_deadline_counts_from_the_beginning_and_a_full_queue_says_where(device: Device) -> None:
    """The first step waits 300 ms for company, so the second has nothing left of 200 ms."""
    device.scale("double", 2, scheduling=Scheduling(batch_wait_ms=300, queue_limit=1))
    device.scale("triple", 3)
    chain = EnsembleConfig(
        "chain",
        ("in",),
        ("out",),
        (StepConfig("a", "double", {"x": "in"}, {"y": "mid"}), StepConfig("b", "triple", {"x": "mid"}, {"y": "out"})),
    )
    device.declare(chain)
    late = device.infer("chain", [[1, 2]], timeout=200_000)
    assert late.status_code == 504
    assert late.json()["error"].startswith("step 'b' (triple@1): its turn did not come within the 0.2 s")
    assert outputs(device.infer("chain", [[1, 2]], timeout=20_000_000))["out"] == [6.0, 12.0]
    answers: list[httpx.Response] = []
    row = [[0, 0]] * 8
    asking = [threading.Thread(target=lambda: answers.append(device.infer("chain", row))) for _ in range(12)]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    assert {one.status_code for one in answers} <= {200, 429}
    for one in answers:
        assert one.status_code == 200 or one.json()["error"].startswith("step 'a' (double@1): too many requests wait")


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ({"content": b"{}"}, 400, "inputs"),
        ({"content": b"x", "headers": {"content-type": "image/jpeg"}}, 415, "takes tensors alone"),
        (
            {"json": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}},
            400,
            "'x', but in",
        ),
    ],
)
def test_bad_requests(device: Device, how: dict[str, Any], status: int, said: str) -> None:
    device.scale("double", 2)
    device.declare(TWICE)
    answer = httpx.post(f"{device.url}/v2/models/twice/infer", **how)
    assert (answer.status_code, said in answer.json()["error"]) == (status, True)
    assert httpx.post(f"{device.url}/v2/models/twice/feedback", json={"labels": []}).status_code == 405
    assert httpx.get(f"{device.url}/v2/models/twice/versions/7").status_code == 404
    assert httpx.delete(f"{device.url}/v2/models/twice").status_code == 405


def test_a_model_is_exchanged_under_load_and_no_request_fails_or_mixes_versions(device: Device) -> None:
    old = device.scale("double", 2)
    device.declare(TWICE)
    stop, answers = threading.Event(), []

    def ask() -> None:
        with httpx.Client(timeout=30) as client:
            body = {"inputs": [{"name": "in", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}
            while not stop.is_set():
                answers.append(client.post(f"{device.url}/v2/models/twice/infer", json=body))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for one in asking:
        one.start()
    try:
        wait_until("answers", lambda: len(answers) > 20)
        for factor in range(3, 15):
            new = device.scale("double", factor, version=str(factor))
            device.channel.send(Unload("double", old.digest))  # at once: requests in the middle of it begin again
            before, old = len(answers), new
            wait_until("answers of it", lambda before=before: len(answers) > before + 20)
    finally:
        stop.set()
        for one in asking:
            one.join()
    assert {one.status_code for one in answers} == {200}
    roots = {float(np.sqrt(outputs(one)["out"][0])) for one in answers}
    assert roots == {float(factor) for factor in range(2, 15)}


def test_what_has_begun_is_answered_before_the_worker_ends(tmp_path: Path) -> None:
    """The worker is told to end while the first of two steps waits for company."""
    chain = EnsembleConfig(
        "chain",
        ("in",),
        ("out",),
        (StepConfig("a", "double", {"x": "in"}, {"y": "mid"}), StepConfig("b", "triple", {"x": "mid"}, {"y": "out"})),
    )
    with running_worker() as (channel, address, process):
        device = Device(channel, f"http://{address}", tmp_path)
        device.scale("triple", 3)  # what was loaded first is let go first
        device.scale("double", 2, scheduling=Scheduling(batch_wait_ms=1500))
        device.declare(chain)
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(device.infer("chain", [[1, 2]])))
        asking.start()
        waits = f"{device.url}/v2/models/chain/stats"
        threading.Event().wait(0.5)
        assert httpx.get(waits).json()["model_stats"][0]["inference_count"] == 0, "it is on its way"
        channel.send(Shutdown())
        asking.join()
        assert process.wait(20) == 0
    assert outputs(answers[0])["out"] == [6.0, 12.0]


def expose(device: Device, model: str, digest: str, mode: ExposureMode, share: float) -> None:
    assert device.ask(Expose(7, model, digest, Exposure(mode, share)), Exposed).ok


def test_a_version_that_is_tried_answers_whole_requests_or_gets_copies(device: Device) -> None:
    device.scale("double", 2)
    new = device.scale("double", 5, version="2", activate=False)
    device.declare(TWICE)
    expose(device, "double", new.digest, ExposureMode.SHADOW, 1.0)
    assert outputs(device.infer("twice", [[1, 1]]))["out"] == [4.0, 4.0]
    compared: list[int] = []

    def copies() -> bool:
        window = device.ask(Collect(1), Window)
        compared.append(sum(one.compared for one in window.models if one.deployment_id == "d-2"))
        return sum(compared) == 2

    wait_until("copies of both steps", copies)
    expose(device, "double", new.digest, ExposureMode.SPLIT, 0.5)
    assert {outputs(device.infer("twice", [[1, 1]]))["out"][0] for _ in range(8)} <= {4.0, 25.0}
    unnamed = {"inputs": [{"name": "in", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}
    seen = {outputs(httpx.post(f"{device.url}/v2/models/twice/infer", json=unnamed))["out"][0] for _ in range(8)}
    assert seen == {4.0, 25.0}


def test_a_version_that_is_tried_and_fails_is_no_clients_loss(device: Device) -> None:
    device.scale("double", 2)
    spec = TensorSpec("x", "float32", (-1, 2), example_shape=(1, 2))
    write(
        device.folder / "one-row",
        [
            helper.make_node(
                "Constant", [], ["shape"], value=helper.make_tensor("shape", TensorProto.INT64, [2], [1, 2])
            ),
            helper.make_node("Reshape", ["x", "shape"], ["y"]),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
    )
    one_row = described("double", (spec,), PAIR[1:], version="2", digest="e" * 64, max_batch=1)
    serving = described("double", (spec,), PAIR[1:], version="1", digest="f" * 64)
    device.load(serving, device.folder / "double-1")
    device.load(one_row, device.folder / "one-row", activate=False)
    device.declare(TWICE)
    expose(device, "double", one_row.digest, ExposureMode.SPLIT, 1.0)
    device.counts()
    assert outputs(device.infer("twice", [[1, 1]]))["out"] == [1.0, 1.0]
    assert outputs(device.infer("twice", [[1, 1], [2, 2]]))["out"] == [4.0, 4.0, 8.0, 8.0]
    assert device.counts()["d-2"][1] == 1, "its failure is its own"


def test_a_device_reports_an_ensemble_that_it_can_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classifier(tmp_path / "1.onnx")
    graph = EnsembleConfig("both", ("in",), ("out",), (StepConfig("m", "m", {"x": "in"}, {"scores": "out"}),))
    with RealDevice(tmp_path / "state", monkeypatch, ensembles=(graph,)) as device:
        assert device.link is not None
        reports = device.link.reports

        def problem() -> Any:
            return next((one for one in reports[-1].problems if one.code == "ensemble_unservable"), None)

        told = wait_until("the problem", problem)
        assert told.ongoing
        assert told.detail == "ensemble both: no version of m is loaded here: roll one out"
        device.desire(device.deployment("d1", tmp_path / "1.onnx", "1"))
        device.await_phase("d1", Phase.ACTIVE)
        wait_until("its end", lambda: not problem().ongoing)
        tensor = {"name": "in", "datatype": "FP32", "shape": [1, 8], "data": [0.0] * 8}
        url = f"http://{device.address}/v2/models/both/infer"
        assert httpx.post(url, json={"inputs": [tensor]}).status_code == 200
