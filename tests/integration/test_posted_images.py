"""Images posted to a real inference worker: answers, refusals, and that other requests go on meanwhile."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from agent.processing.decode import decode
from agent.processing.image import to_row
from agent.protocol.messages import Exposure, ExposureMode
from agent.protocol.processing import (
    Classification,
    ImageStep,
    Interpolation,
    Processing,
)
from agent.serving.ipc import Expose, Exposed
from tests.image_worker import BOX, COLOR, IMAGE, Worker, manifest
from tests.images import COLORS, SIDE, photo, tinted


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(tmp_path)
    try:
        yield worker
    finally:
        worker.stop()


def by_name(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {one["name"]: one for one in answer.json()["outputs"]}


def test_a_jpeg_is_posted_and_labels_come_back(worker: Worker) -> None:
    worker.load(manifest("colors", "1", COLOR))
    said = worker.client.get("/colors").json()
    assert said["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, SIDE, SIDE]}]
    assert "image/jpeg" in said["parameters"]["image_content_types"]
    assert said["parameters"]["image_outputs"] == ["scores", "classes", "labels"]

    answer = worker.post("colors", photo().read_bytes(), **{"X-Request-ID": "mine"})
    assert answer.json()["id"] == "mine"
    assert answer.json()["parameters"] == {"image_width": 512, "image_height": 600}
    found = by_name(answer)
    assert found["labels"]["datatype"] == "BYTES"
    assert found["labels"]["data"] == [COLORS[index] for index in found["classes"]["data"]]
    assert found["scores"]["shape"] == [2]

    # The same row as a tensor: it is answered raw, and with the same numbers.
    row, _ = to_row(decode(photo().read_bytes()), IMAGE, "float32")
    tensor = {"name": "image", "datatype": "FP32", "shape": list(row.shape), "data": row.ravel().tolist()}
    raw = np.array(worker.client.post("/colors/infer", json={"inputs": [tensor]}).json()["outputs"][0]["data"])
    assert raw.argmax() == found["classes"]["data"][0]
    powers = np.exp(raw - raw.max())
    assert found["scores"]["data"] == pytest.approx(sorted(powers / powers.sum())[::-1][:2], rel=1e-5)

    told = worker.client.post(
        "/colors/feedback", json={"labels": [{"id": "mine", "label": found["classes"]["data"][0]}]}
    )
    assert told.json() == {"matched_rows": 1, "unknown_ids": 0}
    assert worker.windows()["1"].requests == 2


def test_boxes_come_back_in_pixels_of_what_was_posted(worker: Worker) -> None:
    worker.load(manifest("boxes", "1", BOX))
    found = by_name(worker.post("boxes", photo().read_bytes()))  # 512 × 600: 14 of 16 columns, from the second on
    assert found["labels"]["data"] == ["red", "blue"]
    assert found["scores"]["data"] == pytest.approx([0.9, 0.7])
    x, y = 512 / 14, 600 / 16
    want = [(4 - 1) * x, 4 * y, (12 - 1) * x, 12 * y, (10 - 1) * x, 4 * y, (14 - 1) * x, 8 * y]
    assert found["boxes"]["data"] == pytest.approx(want, abs=1e-3)
    assert found["boxes"]["shape"] == [2, 4]


def encoded(image: Any, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "kind", "status", "said"),
    [
        (b"", "image/jpeg", 400, "no JPEG"),
        (photo().read_bytes()[:9000], "image/jpeg", 400, "damaged"),
        (photo().read_bytes(), "image/png", 400, "no PNG"),
        (encoded(Image.new("1", (20_000, 20)), "PNG"), "image/png", 400, "20000×20"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "image/gif", 415, "image/jpeg, image/png"),
    ],
    ids=["empty", "cut", "another format", "huge", "unknown format"],
)
def test_hostile_images_are_refused_and_the_worker_goes_on(
    worker: Worker, data: bytes, kind: str, status: int, said: str
) -> None:
    worker.load(manifest("colors", "1", COLOR))
    answer = worker.post("colors", data, kind)
    assert answer.status_code == status
    assert said in answer.json()["error"]
    assert worker.post("colors", photo().read_bytes()).status_code == 200
    assert worker.windows()["1"].rejected == 1


def test_a_version_without_processing_takes_no_images(worker: Worker) -> None:
    worker.load(manifest("colors", "1", None))
    answer = worker.post("colors", photo().read_bytes())
    assert answer.status_code == 415
    assert "--processing" in answer.json()["error"]
    assert "parameters" not in worker.client.get("/colors").json()


def test_without_pillow_the_answer_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text("raise ImportError('absent')")
    path = f"{tmp_path}:{Path(__file__).resolve().parents[2]}"
    worker = Worker(tmp_path, {"PYTHONPATH": path})
    try:
        worker.load(manifest("colors", "1", COLOR))
        answer = worker.post("colors", photo().read_bytes())
        assert answer.status_code == 501
        assert "shoal[images]" in answer.json()["error"]
    finally:
        worker.stop()


def test_other_requests_are_answered_while_a_large_image_is_decoded(worker: Worker) -> None:
    slow = Processing(ImageStep(size=(SIDE, SIDE), interpolation=Interpolation.BICUBIC))
    worker.load(manifest("colors", "1", slow))
    large = encoded(Image.new("RGB", (5600, 5600)), "PNG")
    answers: list[httpx.Response] = []
    url = f"{worker.client.base_url}colors/infer"

    def post() -> None:
        answers.append(httpx.post(url, content=large, headers={"Content-Type": "image/png"}, timeout=60))

    thread = threading.Thread(target=post)
    thread.start()
    meanwhile = 0
    while thread.is_alive():
        assert worker.client.get("/colors/ready").status_code == 200
        meanwhile += not answers
    assert by_name(answers[0])["scores"]["shape"] == [1, 3]
    assert meanwhile > 10


def test_two_versions_with_unlike_processing_each_get_their_own(worker: Worker) -> None:
    worker.load(manifest("colors", "1", COLOR))
    other = Processing(ImageStep(size=(SIDE, SIDE), mean=(0.0, 0.0, 9.0)), Classification(top_k=1))
    second = manifest("colors", "2", other)
    worker.load(second, activate=False)
    exposure = Exposure(mode=ExposureMode.SPLIT, share=0.5)
    worker.channel.send(Expose(4, "colors", second.digest, exposure))
    assert worker.channel.receive() == Exposed(4, ok=True)
    files, _ = tinted(20)
    sizes: dict[str, set[int]] = {"1": set(), "2": set()}
    for data in files:
        answer = worker.post("colors", data)
        sizes[answer.json()["model_version"]].add(len(by_name(answer)["classes"]["data"]))
    assert sizes == {"1": {2}, "2": {1}}


def test_a_shadow_with_unlike_processing_gets_its_own_copy(worker: Worker) -> None:
    worker.load(manifest("colors", "1", COLOR))
    second = manifest("colors", "2", Processing(ImageStep(size=(SIDE, SIDE), scale=1e-9), Classification(top_k=1)))
    worker.load(second, activate=False)
    worker.channel.send(Expose(4, "colors", second.digest, Exposure(mode=ExposureMode.SHADOW, share=1.0)))
    assert worker.channel.receive() == Exposed(4, ok=True)
    files, _ = tinted(12)
    for data in files:
        assert worker.post("colors", data).json()["model_version"] == "1"
    until, asked, disagreed = time.monotonic() + 20, 0, 0
    while asked < 12 and time.monotonic() < until:
        window = worker.windows()["2"]
        asked, disagreed = asked + window.requests, disagreed + window.disagreed
        time.sleep(0.1)
    # Its input is nearly zero, so that the bias alone decides: blue, whatever was posted.
    assert asked == 12
    assert 0 < disagreed < 12
