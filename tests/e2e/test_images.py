"""A version that declares how images become inputs: pushed, built, proven on a device, and asked with JPEG files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from fleet_server.cli.main import app
from tests.cli import CliRunner, Result
from tests.fleet import LocalFleet, wait_until
from tests.images import COLORS, packed, photo, tinted, write_color_net

PROCESSING = """\
image:
  size: [16, 16]
  resize: center-crop
  shorter_side: 18
answer:
  kind: classification
  activation: softmax
  top_k: 2
"""
ACCURACY = {"budgets": {"accuracy_drop_points": 20}}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        fleet.start_agent("cam-1")
        fleet.post("/profiles", {"name": "cams", "runtime": "onnx", "precisions": ["fp32", "int8"], **ACCURACY})
        wait_until("the device", lambda: [one for one in fleet.get("/devices")["items"] if one["profile"]])
        write_color_net(fleet.folder / "colors.onnx")
        (fleet.folder / "labels.txt").write_text("\n".join(COLORS))
        yield fleet
    finally:
        fleet.stop()


def push(fleet: LocalFleet, reference: str, declared: str, *more: str) -> Result:
    file = fleet.folder / "processing.yaml"
    file.write_text(declared)
    arguments = ["model", "push", reference, str(fleet.folder / "colors.onnx"), "--processing", str(file)]
    arguments += ["--labels", str(fleet.folder / "labels.txt"), *more]
    environment = {"SHOAL_URL": fleet.url, "COLUMNS": "200", "NO_COLOR": "1"}
    if fleet.authorization:
        environment["SHOAL_TOKEN"] = fleet.authorization["Authorization"].removeprefix("Bearer ")
    return CliRunner().invoke(app, arguments, env=environment)


def datasets(fleet: LocalFleet) -> tuple[list[bytes], Any, list[str]]:
    """Evaluation files with their classes, and the options that name both data sets: one of files, one of pixels."""
    files, labels = tinted(60, seed=1)
    np.savez(fleet.folder / "files.npz", **packed(files), y=labels)
    calibration = [np.asarray(Image.open(io.BytesIO(one)).resize((24, 20))) for one in tinted(40, seed=2)[0]]
    np.savez(fleet.folder / "pixels.npz", image_pixels=np.stack(calibration))
    options = ["--evaluation", str(fleet.folder / "files.npz"), "--calibration", str(fleet.folder / "pixels.npz")]
    return files, labels, options


@pytest.mark.parametrize(
    ("declared", "code", "said"),
    [
        ("image: {size: [16]}", 2, "processing.image.size"),
        ("image: {size: [16, 16], sizze: 3}", 2, "processing.image.sizze: there is no such field"),
        ("image: {size: [32, 32]}", 1, "processing.image.size: 'image' takes [any, 3, 16, 16]"),
        ("image: {size: [16, 16]}\nanswer: {kind: classification, output: mask}", 1, "the model has no output 'mask'"),
    ],
    ids=["malformed", "misspelt", "another size", "no output"],
)
def test_what_does_not_fit_is_refused_with_its_field(fleet: LocalFleet, declared: str, code: int, said: str) -> None:
    done = push(fleet, "wrong@1", declared)
    assert done.exit_code == code
    assert said in done.stderr
    assert fleet.api.get("/models/wrong").status_code == 404


def test_images_without_a_declaration_name_the_remedy(fleet: LocalFleet) -> None:
    *_, options = datasets(fleet)
    body = {
        "name": "1",
        "sources": [{"format": "onnx", "digest": fleet.upload(fleet.folder / "colors.onnx")}],
        "evaluation": fleet.upload(Path(options[1])),
    }
    refused = fleet.post("/models/plain/versions", body, status=422)
    assert "--processing" in refused["detail"]


def test_a_jpeg_is_posted_and_the_accuracy_is_that_of_the_gate(fleet: LocalFleet) -> None:
    files, labels, options = datasets(fleet)
    done = push(fleet, "colors@1", PROCESSING, *options)
    assert done.exit_code == 0, done.output
    kept = fleet.get("/models/colors/versions/1")["processing"]
    assert kept["image"]["shorter_side"] == 18
    assert kept["answer"]["kind"] == "classification"
    assert push(fleet, "colors@1", PROCESSING, *options).exit_code == 0  # the same again
    changed = push(fleet, "colors@1", PROCESSING.replace("top_k: 2", "top_k: 3"), *options)
    assert changed.exit_code == 5
    assert "immutable" in changed.stderr

    (variant,) = fleet.build("colors@1", "cams")
    assert variant["state"] == "ready", variant
    recipes = {one["recipe"]: one for one in variant["candidates"]}
    assert any(one["precision"] == "int8" and one["measurements"] for one in recipes.values()), recipes

    run = fleet.post("/gate-runs", {"version": "colors@1", "profile": "cams"})["id"]
    wait_until("the gate run", lambda: fleet.get(f"/gate-runs/{run}")["state"] != "running", 120)
    judged = fleet.get(f"/gate-runs/{run}")
    assert judged["state"] == "passed", judged
    proven = fleet.get(f"/variants/{variant['id']}")
    assert proven["gate"]["measured_on"] == "cam-1"
    (trial,) = judged["trials"]
    for result in trial["results"]:  # device and server made the same inputs of the same files
        assert result["accuracy"] == recipes[result["recipe"]]["measurements"]["accuracy"]

    rollout = fleet.rollout("colors@1", allow_unproven=False)
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    url = f"http://127.0.0.1:{fleet.agent_ports['cam-1']}/v2/models/colors/infer"
    first = []
    with httpx.Client(timeout=30) as client:
        for data in files:
            answer = client.post(url, content=data, headers={"Content-Type": "image/jpeg"})
            assert answer.status_code == 200, answer.text
            outputs = {one["name"]: one["data"] for one in answer.json()["outputs"]}
            assert outputs["labels"] == [COLORS[index] for index in outputs["classes"]]
            first.append(outputs["classes"][0])
        assert client.post(url, content=photo().read_bytes(), headers={"Content-Type": "image/jpeg"}).status_code == 200
    accuracy = float((np.array(first) == labels).mean())
    assert 0.5 < accuracy < 1
    assert accuracy == proven["measurements"]["accuracy"]
