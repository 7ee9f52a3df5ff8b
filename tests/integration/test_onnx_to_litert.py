"""ONNX alone becomes LiteRT: by onnx2tf where its environment is set up (`make setup-onnx2tf`), and never unchecked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from torch import nn

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from converters.job import BuildJob, BuildResult, DataFile, SourceFile, Target
from converters.pipeline import build
from converters.steps.export import export_onnx, quiet
from deploy.demo.net import build as demo_net
from tests.onnx2tf import ONNX2TF, converted, needs_onnx2tf, stand_in

ROWS = 48
Arrays = dict[str, np.ndarray]


class TwoInputs(nn.Module):
    """Inputs of the same shape and of unlike scale: confused while int8 is calibrated, one of them is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(16, 3)

    def forward(self, zebra: torch.Tensor, apple: torch.Tensor) -> torch.Tensor:
        sides = torch.relu(self.left(zebra)), torch.relu(self.right(apple * 1000))
        return self.out(torch.cat(sides, 1))  # type: ignore[no-any-return]


class NotSquare(nn.Module):
    """Axes that are moved by the net itself, and flattened: where layouts go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.out = nn.Linear(6 * 12 * 20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.out(x.permute(0, 2, 3, 1).flatten(1))  # type: ignore[no-any-return]


class Pixels(nn.Module):
    """An answer with channels, as wide as high as deep."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """A small vision transformer: images become words."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu", dropout=0.0)
        self.out = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(self.patch(x).flatten(2).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


class Text(nn.Module):
    """Integer inputs, attention, a free length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.out = nn.Linear(32, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(self.embed(ids))
        weight = mask.unsqueeze(-1).float()
        return self.out((hidden * weight).sum(1) / weight.sum(1))  # type: ignore[no-any-return]


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((ROWS, *shape)).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """A net and its inputs; `renamed` gives tensors of the exported file other names."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Arrays]
    renamed: dict[str, str] = field(default_factory=dict)


def text_inputs() -> Arrays:
    rng = np.random.default_rng(1)
    mask = (np.arange(16)[None] < rng.integers(4, 17, (ROWS, 1))).astype(np.int64)
    return {"ids": rng.integers(0, 100, (ROWS, 16)), "mask": mask}


def pair() -> Arrays:
    return {"zebra": floats(12) * 10, "apple": floats(12)[::-1] / 100}


CASES = {
    "demo": Case(demo_net, lambda: {"x": floats(3, 28, 28)}),
    "mlp": Case(lambda: nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)), lambda: {"x": floats(20)}),
    "two inputs": Case(TwoInputs, pair),
    "odd names": Case(TwoInputs, pair, {"zebra": "z/in.1:0", "apple": "a b::c"}),
    "not square": Case(NotSquare, lambda: {"x": floats(3, 24, 40)}),
    "pixels": Case(Pixels, lambda: {"x": floats(3, 16, 16)}),
    "cube": Case(lambda: nn.Conv2d(8, 8, 3, padding=1), lambda: {"x": floats(8, 8, 8)}),
    "channels as long as the rest": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)),
        lambda: {"x": floats(3, 3, 3)},
    ),
    "signal": Case(lambda: nn.Conv1d(6, 8, 5, padding=2), lambda: {"x": floats(6, 8)}),
    "patches": Case(Patches, lambda: {"x": floats(3, 16, 24)}),
    "text": Case(Text, text_inputs),
}


def rename(path: Path, names: dict[str, str]) -> None:
    model = onnx.load(str(path))
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for value in model.graph.input:
        value.name = names.get(value.name, value.name)
    onnx.save(model, str(path))


def job(folder: Path, case: Case, python: Path, *precisions: Precision) -> BuildJob:
    """A version that holds ONNX alone, to be built for a LiteRT profile; labels are the net's own answers."""
    torch.manual_seed(0)
    net, inputs = case.make().eval(), case.inputs()
    source = folder / "source.onnx"
    with quiet():
        export_onnx(net, [array[:2] for array in inputs.values()], source, list(inputs))
    with torch.no_grad():
        answers = net(*(torch.from_numpy(array.copy()) for array in inputs.values())).numpy()
    rename(source, case.renamed)
    inputs = {case.renamed.get(name, name): array for name, array in inputs.items()}
    np.savez(folder / "evaluation.npz", **inputs, y=answers.reshape(ROWS, -1).argmax(1))
    np.savez(folder / "calibration.npz", **inputs)
    return BuildJob(
        sources=(SourceFile(ModelFormat.ONNX, "0" * 64, str(source)),),
        target=Target("p", RuntimeName.LITERT, ("cpu",), precisions or (Precision.FP32,)),
        calibration=DataFile("1" * 64, str(folder / "calibration.npz")),
        evaluation=DataFile("2" * 64, str(folder / "evaluation.npz")),
        onnx2tf_python=str(python) if python else None,
    )


def built(folder: Path, wanted: BuildJob) -> BuildResult:
    (folder / "work").mkdir()
    return build(wanted, folder / "work", lambda _fraction, _step: None)


@needs_onnx2tf
@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors:UserWarning")  # of the quantizer's calibration
@pytest.mark.parametrize("name", CASES)
def test_onnx_becomes_litert_with_the_names_and_axes_of_the_source(tmp_path: Path, name: str) -> None:
    result = built(tmp_path, job(tmp_path, CASES[name], ONNX2TF, Precision.FP32, Precision.INT8))
    exact, small = result.candidates
    assert exact.error is None
    assert exact.measurements is not None
    assert exact.measurements.agreement == 1.0
    assert exact.measurements.max_difference < 1e-4
    case = CASES[name]
    expected = {case.renamed.get(name, name): (1, *array.shape[1:]) for name, array in case.inputs().items()}
    assert {spec.name: spec.shape for spec in exact.inputs} == expected
    assert exact.lineage is not None
    assert [one.name for one in exact.lineage.passes][:2] == ["onnx-fix-shapes", "onnx2tf"]
    assert exact.lineage.passes[1].parameters["keep_shape_absolutely_input_names"] == ",".join(expected)
    assert exact.lineage.tools["onnx2tf"]
    assert exact.lineage.source_format is ModelFormat.ONNX
    if name == "text":
        # Its mean over words is a division, whose quantized kernel refuses a divisor that rounds to zero.
        assert "DIV" in (small.error or "")
        return
    assert small.measurements is not None, small.error
    assert small.measurements.size < exact.measurements.size or exact.measurements.size < 16_000
    # The demo's net has not learned here: its answers to noise are near ties, which int8 turns over.
    assert small.measurements.agreement > (0.4 if name == "demo" else 0.8)


@needs_onnx2tf
def test_a_net_that_onnx2tf_can_not_convert_says_why(tmp_path: Path) -> None:
    wanted = job(tmp_path, CASES["not square"], ONNX2TF)
    source = Path(wanted.sources[0].path)
    model = onnx.load(str(source))
    answer = model.graph.output[0].name
    last = next(node for node in model.graph.node if answer in node.output)
    last.output[list(last.output).index(answer)] = "before"
    # ONNX Runtime runs this operator; onnx2tf stumbles over it.
    model.graph.node.append(onnx.helper.make_node("CenterCropPad", ["before", "size"], [answer], axes=[1]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([5], np.int64), "size"))
    onnx.save(model, str(source))
    result = built(tmp_path, wanted)
    assert result.chosen is None
    assert "onnx2tf can't convert this net" in (result.candidates[0].error or "")
    assert "TFLite form of its own" in (result.candidates[0].error or "")


def tflite(folder: Path, *, seed: int) -> Path:
    torch.manual_seed(seed)
    return converted(NotSquare(), torch.zeros(1, 3, 24, 40), folder / f"{seed}.tflite")


def test_what_answers_like_the_source_is_taken(tmp_path: Path) -> None:
    result = built(tmp_path, job(tmp_path, CASES["not square"], stand_in(tmp_path, tflite(tmp_path, seed=0))))
    assert result.chosen == 0
    assert result.candidates[0].lineage is not None
    assert result.candidates[0].lineage.tools["stand-in"] == "1"
    shapes = json.loads(str(result.candidates[0].lineage.passes[0].parameters["shapes"]))
    assert shapes == {"x": [1, 3, 24, 40]}


def test_what_answers_otherwise_is_refused(tmp_path: Path) -> None:
    result = built(tmp_path, job(tmp_path, CASES["not square"], stand_in(tmp_path, tflite(tmp_path, seed=7))))
    assert result.chosen is None
    assert "not the same net" in (result.candidates[0].error or "")


def test_a_failing_tool_is_quoted(tmp_path: Path) -> None:
    result = built(tmp_path, job(tmp_path, CASES["not square"], stand_in(tmp_path, None)))
    assert "no such operator" in (result.candidates[0].error or "")


def test_without_the_tool_both_remedies_are_named(tmp_path: Path) -> None:
    wanted = job(tmp_path, CASES["not square"], Path("/nowhere"))
    wanted = BuildJob(wanted.sources, wanted.target, wanted.calibration, wanted.evaluation)
    error = built(tmp_path, wanted).candidates[0].error or ""
    assert ".tflite" in error
    assert "make setup-onnx2tf" in error


def test_an_environment_without_the_tool_is_named(tmp_path: Path) -> None:
    wanted = job(tmp_path, CASES["not square"], Path("/usr/bin/env"))
    wanted = msgspec.structs.replace(wanted, onnx2tf_python=str(tmp_path))
    error = built(tmp_path, wanted).candidates[0].error or ""
    assert "does not run onnx2tf" in error
    assert "SHOAL_ONNX2TF_PYTHON" in error
