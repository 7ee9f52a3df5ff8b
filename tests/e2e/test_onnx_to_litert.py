"""A version of ONNX alone on LiteRT devices: converted, gated, rolled out and asked; and a bad conversion refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from converters.steps.export import export_onnx, quiet
from tests.fleet import LocalFleet, wait_until
from tests.onnx2tf import converted, needs_onnx2tf, stand_in

ROWS = 64


class Net(nn.Module):
    """Images that are not square, flattened after a convolution."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)  # type: ignore[no-any-return]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    fleet = LocalFleet(tmp_path / "fleet")
    fleet.folder.mkdir()
    try:
        yield fleet
    finally:
        fleet.stop()


def push(fleet: LocalFleet) -> tuple[Path, np.ndarray]:
    """Push a version of ONNX alone, with the net's own answers as labels; returns its file and its rows."""
    x = np.random.default_rng(1).standard_normal((ROWS, 3, 12, 18)).astype(np.float32)
    source = fleet.folder / "source.onnx"
    with quiet():
        export_onnx(Net(0).eval(), [x], source, ["x"])
    answers = onnxruntime.InferenceSession(str(source)).run(None, {"x": x})[0]
    np.savez(fleet.folder / "evaluation.npz", x=x, y=answers.argmax(1))
    np.savez(fleet.folder / "calibration.npz", x=x)
    fleet.push("camera", "1", source)
    return source, x


def profile(fleet: LocalFleet) -> None:
    budgets = {"accuracy_drop_points": 10}
    wanted = {"name": "edge", "match": {}, "runtime": "litert", "precisions": ["fp32", "int8"], "budgets": budgets}
    fleet.post("/profiles", wanted)


@needs_onnx2tf
def test_onnx_alone_serves_on_litert_devices(fleet: LocalFleet) -> None:
    fleet.start_server()
    fleet.start_agent("dev-1")
    profile(fleet)
    source, x = push(fleet)
    wait_until("the device", lambda: [d for d in fleet.get("/devices")["items"] if d["profile"]])
    variant = fleet.build("camera@1", "edge")[0]
    assert variant["state"] == "ready", variant
    assert [one["name"] for one in variant["lineage"]["passes"]][:2] == ["onnx-fix-shapes", "onnx2tf"]
    assert variant["lineage"]["tools"]["onnx2tf"]
    assert {one["recipe"] for one in variant["candidates"] if one["measurements"]} >= {
        "litert-fp32",
        "litert-static-int8",
    }
    rollout = fleet.rollout("camera@1")
    wait_until("the rollout", lambda: fleet.rollout_state(rollout) == "succeeded")
    answer = fleet.infer("dev-1", "camera", x[:5])["outputs"][0]
    expected = onnxruntime.InferenceSession(str(source)).run(None, {"x": x[:5]})[0]
    found = np.array(answer["data"]).reshape(answer["shape"])
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=0.1 * np.abs(expected).max())


def test_a_bad_conversion_is_refused(fleet: LocalFleet, tmp_path: Path) -> None:
    wrong = converted(Net(7), torch.zeros(1, 3, 12, 18), tmp_path / "wrong.tflite")
    fleet.start_server(SHOAL_ONNX2TF_PYTHON=str(stand_in(tmp_path, wrong)))
    profile(fleet)
    push(fleet)
    variant = fleet.build("camera@1", "edge")[0]
    assert variant["state"] == "failed"
    assert variant["digest"] is None
    assert "what onnx2tf made differs by" in variant["failure"]["detail"]
    assert "push the version with a TFLite form of its own" in variant["failure"]["detail"]
