"""`GET /metrics` of a device's local API: a real worker, with this test in the supervisor's place."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from prometheus_client.parser import text_string_to_metric_families

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.serving.framing import FrameChannel
from agent.serving.ipc import AskFigures, TellFigures
from agent.telemetry.exposition import Family, exposition
from agent.telemetry.figures import PhaseFigure, SupervisorFigures
from tests import promtool
from tests.fleet import write_classifier
from tests.serving_worker import serve, start_worker

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
FIGURES = SupervisorFigures(
    "camera-1", connected=True, spooled=3, spooled_bytes=700, spool_dropped=2, workers_ended=1, problems=0, rss_mb=20.5,
    deployments=(PhaseFigure("0190", "tri", "2", "active"),),
)  # fmt: skip
ROW = np.array([[0.1, 0.9, 0.2, 0, 0, 0, 0, 0]], np.float32)


def manifest(digest: str, version: str) -> Manifest:
    return Manifest(
        digest * 64, 10, 4, "tri", version, "v", "p", ModelFormat.ONNX, RuntimeName.ONNX, Precision.FP32,
        (TensorSpec("x", "float32", (-1, 8)),), (TensorSpec("scores", "float32", (-1, 3)),), max_batch=8,
    )  # fmt: skip


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[FrameChannel, str, Path]]:
    """A worker with `tri` version 1 active: its channel, its address, and the model's file."""
    write_classifier(tmp_path / "model")
    found = start_worker()
    try:
        serve(found.channel, manifest("a", "1"), tmp_path / "model")
        yield found.channel, found.url, tmp_path / "model"
    finally:
        found.channel.close()
        assert found.process.wait(20) == 0


def supervisor_says(channel: FrameChannel, figures: SupervisorFigures) -> threading.Thread:
    """Answer the next question as the supervisor does."""

    def answer() -> None:
        while not isinstance(channel.receive(), AskFigures):
            pass
        channel.send(TellFigures(figures))

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return thread


def text(channel: FrameChannel, url: str) -> str:
    answering = supervisor_says(channel, FIGURES)
    answer = httpx.get(f"{url}/metrics", timeout=30)
    answering.join(10)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return answer.text


def samples(said: str) -> Samples:
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(said)
        for one in family.samples
    }


def of(found: Samples, name: str, **labels: str) -> float:
    [value] = [value for (known, its), value in found.items() if known == name and set(labels.items()) <= set(its)]
    return value


def infer(url: str, times: int) -> None:
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    tensor = triton.InferInput("x", [1, 8], "FP32")
    tensor.set_data_from_numpy(ROW)
    for _ in range(times):
        client.infer("tri", [tensor])
    client.close()


def test_what_models_did_is_counted(worker: tuple[FrameChannel, str, Path]) -> None:
    channel, url, file = worker
    infer(url, 7)
    found = samples(text(channel, url))
    mine = {"model": "tri", "version": "1", "artifact": "a" * 12}
    assert of(found, "shoal_agent_inference_requests_total", **mine) == 7
    assert of(found, "shoal_agent_inference_errors_total", **mine) == 0
    assert of(found, "shoal_agent_inference_duration_seconds_count", **mine) == 7
    assert of(found, "shoal_agent_inference_duration_seconds_bucket", **mine, le="+Inf") == 7
    assert 0 < of(found, "shoal_agent_inference_duration_seconds_sum", **mine) < 60
    assert of(found, "shoal_agent_batch_rows_sum", **mine) == 7
    assert of(found, "shoal_agent_queue_requests", **mine) == 0
    assert of(found, "shoal_agent_model_serving", **mine, provider="cpu") == 1
    assert of(found, "shoal_agent_model_swaps_total", model="tri") == 1
    serve(channel, manifest("b", "2"), file)
    again = samples(text(channel, url))
    assert of(again, "shoal_agent_model_serving", version="1") == 0
    assert of(again, "shoal_agent_model_serving", version="2") == 1
    assert of(again, "shoal_agent_model_swaps_total", model="tri") == 2


def test_the_supervisor_is_asked_when_somebody_asks(worker: tuple[FrameChannel, str, Path]) -> None:
    channel, url, _ = worker
    found = samples(text(channel, url))
    assert of(found, "shoal_agent_info", device="camera-1") == 1
    assert of(found, "shoal_agent_broker_connected") == 1
    assert of(found, "shoal_agent_spool_batches") == 3
    assert of(found, "shoal_agent_spool_bytes") == 700
    assert of(found, "shoal_agent_spool_dropped_total") == 2
    assert of(found, "shoal_agent_workers_ended_total") == 1
    assert of(found, "shoal_agent_supervisor_resident_bytes") == 20.5 * 2**20
    assert of(found, "shoal_agent_deployment_phase", deployment="0190", phase="active", version="2") == 1


def test_a_supervisor_that_is_busy_delays_nobody_for_long(worker: tuple[FrameChannel, str, Path]) -> None:
    _, url, _ = worker
    answers: list[httpx.Response] = []
    asking = [
        threading.Thread(target=lambda: answers.append(httpx.get(f"{url}/metrics", timeout=30))) for _ in range(3)
    ]
    for one in asking:
        one.start()
    for one in asking:
        one.join(30)
    assert [one.status_code for one in answers] == [200] * 3
    assert "shoal_agent_worker_resident_bytes" in answers[0].text
    assert "shoal_agent_info" not in answers[0].text


def test_only_get_is_offered(worker: tuple[FrameChannel, str, Path]) -> None:
    assert httpx.post(f"{worker[1]}/metrics", content=b"x").status_code == 404


@pytest.mark.skipif(not promtool.FOUND, reason="promtool is not installed (apt-get install prometheus)")
def test_promtool_finds_nothing_to_mend(worker: tuple[FrameChannel, str, Path]) -> None:
    channel, url, _ = worker
    infer(url, 2)
    promtool.check_metrics(text(channel, url))


def test_labels_and_numbers_are_written_so_that_they_are_read_again() -> None:
    odd = 'a "b" \\ c\nd'
    family = Family("x_total", "counter", "Of\nall \\ sorts.").add(1e300, {"name": odd}).add(0.1, {"name": ""})
    histogram = Family("h", "histogram", "Sizes.")
    histogram.add_histogram((1, 2.5), {0.5: 2, 2.5: 1, math.inf: 4}, 3.5, {"m": "n"})
    [first, second] = text_string_to_metric_families(
        exposition([family, Family("none", "gauge", "."), histogram]).decode()
    )
    assert [(one.labels["name"], one.value) for one in first.samples] == [(odd, 1e300), ("", 0.1)]
    assert first.documentation == "Of\nall \\ sorts."
    assert [(one.name, one.labels.get("le"), one.value) for one in second.samples] == [
        *(("h_bucket", "1", 2), ("h_bucket", "2.5", 3), ("h_bucket", "+Inf", 7)),
        *(("h_sum", None, 3.5), ("h_count", None, 7)),
    ]
