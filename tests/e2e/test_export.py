"""`shoal export` of a variant that a server built: the repository holds what devices run, and answers the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import yaml
from google.protobuf import text_format

from fleet_server.cli.main import app
from tests.cli import CliRunner, Result
from tests.fleet import LocalFleet, write_classifier
from tests.triton_messages import ModelConfig


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A server with a version that is built for two profiles."""
    fleet = LocalFleet(tmp_path_factory.mktemp("fleet"))
    try:
        fleet.start_server()
        for name in ("one", "two"):
            fleet.post("/profiles", {"name": name, "match": {}, "runtime": "onnx", "precisions": ["fp32"]})
        write_classifier(fleet.folder / "m.onnx")
        fleet.push("scale", "7", fleet.folder / "m.onnx")
        fleet.push("scale", "8", fleet.folder / "m.onnx")
        fleet.build("scale@7", "one", "two")
        yield fleet
    finally:
        fleet.stop()


def export(fleet: LocalFleet, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--url", fleet.url, "--token", fleet.token, "export", *arguments])


def test_a_model_repository_of_triton(fleet: LocalFleet, tmp_path: Path) -> None:
    done = export(fleet, "scale", "7", "--output", str(tmp_path), "--profile", "one")
    assert done.exit_code == 0, done.stderr
    config = text_format.Parse((tmp_path / "scale" / "config.pbtxt").read_text(), ModelConfig())
    assert config.name == "scale"
    path = tmp_path / "scale" / "7" / config.default_model_filename
    (variant,) = fleet.get("/variants", version="scale@7", profile="one")["items"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == variant["digest"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(one.name, one.shape[1:]) for one in session.get_inputs()] == [
        (one.name, list(one.dims)) for one in config.input
    ]
    assert [(one.name, one.shape[1:]) for one in session.get_outputs()] == [
        (one.name, list(one.dims)) for one in config.output
    ]
    rows = np.random.default_rng(0).standard_normal((config.max_batch_size, 8)).astype(np.float32)
    assert (session.run(None, {config.input[0].name: rows})[0].argmax(1) == rows[:, :3].argmax(1)).all()
    again = export(fleet, "scale", "7", "--output", str(tmp_path), "--profile", "one")
    assert again.exit_code == 1
    assert "is there already" in " ".join(again.stderr.split())


def test_an_inference_service_of_kserve(fleet: LocalFleet, tmp_path: Path) -> None:
    options = ("--format", "kserve", "--profile", "two", "--storage", "s3://bucket/shoal")
    done = export(fleet, "scale", "7", "--output", str(tmp_path), *options)
    assert done.exit_code == 0, done.stderr
    service = yaml.safe_load((tmp_path / "scale" / "inference-service.yaml").read_text())
    where = service["spec"]["predictor"]["model"]["storageUri"]
    assert where == "s3://bucket/shoal/scale/models", "as the folder lies below what is put at the storage"
    assert (tmp_path / "scale" / "models" / "scale" / "7" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("scale", "7"), 1, "has variants for one, two: choose one"),
        (("scale", "8"), 1, "has no ready variant for ONNX Runtime"),
        (("absent", "7"), 4, "absent"),
        (("scale", "7", "--format", "kserve", "--profile", "one", "--storage", "here"), 1, "is no URI"),
        (("scale", "7", "--format", "ray"), 2, "ray"),
    ],
)
def test_what_cannot_be_exported_is_said(
    fleet: LocalFleet, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = export(fleet, *arguments, "--output", str(tmp_path / "out"))
    assert (done.exit_code, said in " ".join(done.stderr.split())) == (code, True), done.stderr
    assert not list(tmp_path.rglob("*.onnx"))
    assert not list(tmp_path.rglob(".export-*"))
