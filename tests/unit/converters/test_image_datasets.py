"""Data sets of images: server and device make the same inputs of them, each version those that it declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName, TensorSpec
from agent.protocol.processing import Classification, ImageStep, Processing
from agent.trial.dataset import DataSetError, read_checked
from converters import dataset as reading
from converters.cache import data_digests
from converters.dataset import example_rows, load_dataset
from converters.errors import ConversionError
from converters.inspection import inspect
from converters.job import BaselineArtifact, BuildJob, DataFile, InspectJob, SourceFile, Target
from converters.pipeline import build
from converters.training.data import Rows, read_validation
from tests.images import SIDE, packed, tinted, write_color_net

SPECS = (TensorSpec("image", "float32", (-1, 3, SIDE, SIDE)),)
STEP = ImageStep(size=(SIDE, SIDE))
COLOR = Processing(STEP, Classification())
TARGET = Target("p", RuntimeName.ONNX, ("cpu",), (Precision.FP32,))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    found, labels = tinted(30)
    np.savez(tmp_path / "files.npz", **packed(found), y=labels)
    return tmp_path / "files.npz"


def test_server_and_device_make_the_same_inputs(files: Path) -> None:
    server = load_dataset(files, SPECS, "evaluation", COLOR)
    device = read_checked(files, SPECS, COLOR)
    assert server.inputs["image"].shape == (30, 3, SIDE, SIDE)
    assert server.inputs["image"].tobytes() == device.inputs["image"].tobytes()
    assert np.array_equal(server.labels, device.labels)


def test_inputs_that_are_there_are_taken_as_they_are(tmp_path: Path) -> None:
    ready = np.ones((2, 3, SIDE, SIDE), np.float32)
    for name in ("x", "image"):
        np.savez(tmp_path / "ready.npz", **{name: ready}, image_pixels=np.zeros((5, 4, 4, 3), np.uint8))
        found = load_dataset(tmp_path / "ready.npz", SPECS, "evaluation", COLOR)
        assert np.array_equal(found.inputs["image"], ready)


def test_without_a_declaration_the_remedy_is_named(files: Path) -> None:
    with pytest.raises(ConversionError, match="--processing"):
        load_dataset(files, SPECS, "evaluation")


def test_what_is_no_image_is_told_of_by_its_place(tmp_path: Path) -> None:
    found, _ = tinted(3)
    found[1] = found[1][:200]
    np.savez(tmp_path / "cut.npz", **packed(found))
    with pytest.raises(ConversionError, match="evaluation: image 1: it is damaged"):
        load_dataset(tmp_path / "cut.npz", SPECS, "evaluation", COLOR)
    with pytest.raises(DataSetError, match="image 1"):
        read_checked(tmp_path / "cut.npz", SPECS, COLOR)


def test_inputs_are_bounded_whatever_the_images_weigh(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BYTES_LIMIT", 300_000)
    large = Processing(ImageStep(size=(64, 64)))
    with pytest.raises(ConversionError, match="give fewer"):
        load_dataset(files, (TensorSpec("image", "float32", (-1, 3, -1, -1)),), "evaluation", large)


def test_a_net_is_exported_on_rows_made_of_images(files: Path) -> None:
    rows = example_rows(files, "evaluation", COLOR)
    assert {name: array.shape for name, array in rows.items()} == {"image": (2, 3, SIDE, SIDE)}


def test_images_decide_nothing_in_training(files: Path) -> None:
    assert read_validation(files, Rows({"image": np.zeros((30, 1))}, np.zeros(30, np.int64))) is None


def source(folder: Path, bias: float = 0.05) -> SourceFile:
    path = folder / f"colors{bias}.onnx"
    write_color_net(path, bias=bias)
    return SourceFile(ModelFormat.ONNX, "0" * 64, str(path))


def test_inspection_names_the_field_that_does_not_fit(tmp_path: Path, files: Path) -> None:
    job = InspectJob((source(tmp_path),), evaluation=DataFile("1" * 64, str(files)), classes=3, processing=COLOR)
    assert inspect(job, lambda _share, _text: None).evaluation_samples == 30
    wrong = msgspec.structs.replace(job, processing=Processing(ImageStep(size=(SIDE, SIDE + 1))))
    with pytest.raises(ConversionError) as caught:
        inspect(wrong, lambda _share, _text: None)
    assert (caught.value.code, caught.value.field) == ("bad_processing", "processing.image.size")


def job_of(tmp_path: Path, files: Path, **fields: Any) -> BuildJob:
    data = DataFile("1" * 64, str(files))
    return BuildJob((source(tmp_path),), TARGET, evaluation=data, processing=COLOR, **fields)


def test_an_earlier_version_gets_the_inputs_that_it_declares(tmp_path: Path, files: Path) -> None:
    """The same net behind halved means: with the other's inputs its bias weighs twice as much."""
    baseline = BaselineArtifact(
        "1", source(tmp_path).path, ModelFormat.ONNX, SPECS, (TensorSpec("scores", "float32", (-1, 3)),), COLOR
    )
    dim = Processing(ImageStep(size=(SIDE, SIDE), scale=1 / 2550), Classification())
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    own = build(job_of(tmp_path, files, baseline=baseline), tmp_path / "own", lambda _share, _text: None)
    job = msgspec.structs.replace(job_of(tmp_path, files, baseline=baseline), processing=dim)
    other = build(job, tmp_path / "other", lambda _share, _text: None)
    assert own.baseline is not None
    assert other.baseline is not None
    assert own.source.accuracy == own.baseline.accuracy == other.baseline.accuracy
    assert other.source.accuracy != own.source.accuracy


def test_earlier_conversions_with_other_inputs_are_not_used(tmp_path: Path, files: Path) -> None:
    job = job_of(tmp_path, files)
    other = msgspec.structs.replace(job, processing=Processing(ImageStep(size=(SIDE, SIDE), scale=1.0)))
    answer = msgspec.structs.replace(job, processing=Processing(STEP, Classification(top_k=1)))
    assert data_digests(job) != data_digests(other)
    assert data_digests(job) == data_digests(answer)
