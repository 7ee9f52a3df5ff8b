"""Every recipe on unlike nets, with the runtimes that devices use: it builds and answers alike, or says why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from converters.errors import ConversionError
from converters.inspection import inspect
from converters.job import BuildJob, BuildResult, DataFile, InspectJob, SourceFile, Target
from converters.pipeline import build
from converters.planner import NOISE, RECIPES, plan
from converters.steps.export import export_onnx, export_tflite, quiet

ROWS = 64


def sources(*paths: Path) -> tuple[SourceFile, ...]:
    return tuple(SourceFile(ModelFormat(path.suffix[1:]), "0" * 64, str(path)) for path in paths)


def data(folder: Path, **arrays: np.ndarray) -> DataFile:
    path = folder / f"{'-'.join(arrays)}.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return DataFile("1" * 64, str(path))


def built(folder: Path, job: BuildJob) -> BuildResult:
    (folder / "work").mkdir(exist_ok=True)
    return build(job, folder / "work", lambda _fraction, _step: None)


def target(runtime: RuntimeName) -> Target:
    return Target("p", runtime, ("cpu",), tuple(Precision), accuracy_drop_points=5.0)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16 * 8 * 8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.out(torch.max_pool2d(torch.relu(self.conv(image)), 2).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*experimental_preserve_all_tensors:UserWarning")
@pytest.mark.parametrize("runtime", [RuntimeName.ONNX, RuntimeName.LITERT])
def test_every_recipe_on_a_convolutional_net(tmp_path: Path, runtime: RuntimeName) -> None:
    torch.manual_seed(0)
    net = Small().eval()
    images = np.random.default_rng(0).random((ROWS, 3, 16, 16), dtype=np.float32)
    with quiet():
        export_onnx(net, [images[:2]], tmp_path / "m.onnx", ["image"])
        export_tflite(net, [images[:1]], tmp_path / "m.tflite")
    with torch.no_grad():
        labels = net(torch.from_numpy(images)).argmax(1).numpy()
    result = built(
        tmp_path,
        BuildJob(
            sources(tmp_path / "m.onnx", tmp_path / "m.tflite"),
            target(runtime),
            data(tmp_path, image=images),
            data(tmp_path, image=images, y=labels),
        ),
    )
    assert [one.recipe for one in result.candidates] == [recipe.name for recipe in plan(target(runtime))]
    for one in result.candidates:
        if one.recipe.startswith("onnx-sums"):
            # It normalizes no layer: they must say so.
            assert "no addition" in (one.error or "")
            assert one.fate.startswith("not built: ")
            continue
        assert one.error is None, f"{one.recipe}: {one.error}"
        assert one.measurements is not None
        assert one.measurements.agreement >= 0.95, one.recipe
        assert one.lineage is not None
        assert one.lineage.passes
        assert all(step.bytes_before > 0 and step.bytes_after > 0 for step in one.lineage.passes)
        assert one.lineage.tools
        assert one.fate
    assert result.chosen is not None
    chosen = result.candidates[result.chosen]
    assert chosen.within_budgets
    assert chosen.fate == "picked"
    assert chosen.on_front
    assert all(
        chosen.measurements.latency_p50_ms <= one.measurements.latency_p50_ms * NOISE
        for one in result.candidates
        if one.within_budgets and one.measurements and chosen.measurements
    )


def test_recipes_have_names_of_their_own() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)


def two_inputs(path: Path, *, opset: int) -> None:
    """Integers looked up in a table, plus a float input; answers scores."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((20, 6)).astype(np.float32), "table"),
        numpy_helper.from_array(rng.standard_normal((6, 3)).astype(np.float32), "last"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "word"], ["looked"]),
        helper.make_node("Add", ["looked", "extra"], ["sum"]),
        helper.make_node("MatMul", ["sum", "last"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [
            helper.make_tensor_value_info("word", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("extra", TensorProto.FLOAT, ["n", 6]),
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 7
    onnx.save(model, str(path))


@pytest.mark.parametrize("opset", [11, 13, 17, 20])
def test_integers_several_inputs_and_old_opsets(tmp_path: Path, opset: int) -> None:
    two_inputs(tmp_path / "m.onnx", opset=opset)
    rng = np.random.default_rng(1)
    inputs = {"word": rng.integers(0, 20, ROWS), "extra": rng.standard_normal((ROWS, 6)).astype(np.float32)}
    result = built(
        tmp_path,
        BuildJob(
            sources(tmp_path / "m.onnx"),
            target(RuntimeName.ONNX),
            data(tmp_path, **inputs),
            data(tmp_path, **inputs, y=np.zeros(ROWS, np.int64)),
        ),
    )
    plain = result.candidates[0]
    assert plain.error is None
    assert [(spec.name, spec.dtype) for spec in plain.inputs] == [("word", "int64"), ("extra", "float32")]
    assert plain.max_batch > 1
    for one in result.candidates:
        assert one.error or (one.measurements and one.measurements.agreement > 0.8), one.recipe


def test_weights_of_7_bits_keep_to_them(tmp_path: Path) -> None:
    two_inputs(tmp_path / "m.onnx", opset=17)
    inputs = {"word": np.arange(20), "extra": np.random.default_rng(0).random((20, 6), dtype=np.float32)}
    result = built(
        tmp_path,
        BuildJob(
            sources(tmp_path / "m.onnx"), target(RuntimeName.ONNX), data(tmp_path, **inputs), data(tmp_path, **inputs)
        ),
    )
    largest = {}
    for one in result.candidates:
        if one.recipe in {"onnx-static-u8s8", "onnx-static-u8s7", "onnx-dynamic-matmul-channels-s7"}:
            assert one.path, one.error
            weights = [
                numpy_helper.to_array(tensor)
                for tensor in onnx.load(str(tmp_path / "work" / one.path)).graph.initializer
                if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1
            ]
            largest[one.recipe] = max(int(np.abs(weight.astype(int)).max()) for weight in weights)
    assert largest["onnx-static-u8s8"] > 64
    assert largest["onnx-static-u8s7"] <= 64
    assert largest["onnx-dynamic-matmul-channels-s7"] <= 64


def test_without_labels_agreement_stands_for_accuracy(tmp_path: Path) -> None:
    two_inputs(tmp_path / "m.onnx", opset=17)
    inputs = {"word": np.arange(20), "extra": np.zeros((20, 6), np.float32)}
    result = built(
        tmp_path,
        BuildJob(sources(tmp_path / "m.onnx"), target(RuntimeName.ONNX), None, data(tmp_path, **inputs)),
    )
    by_name = {one.recipe: one for one in result.candidates}
    assert by_name["onnx-fp32"].measurements is not None
    assert by_name["onnx-fp32"].measurements.accuracy is None
    assert by_name["onnx-fp32"].measurements.agreement == 1.0
    assert "calibration" in (by_name["onnx-static-u8s8"].error or "")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x04\x95 a pickle", "can run code"),
        (b"PK\x03\x04 a torch zip", "can run code"),
        (b"\x08\x07\x12\x04junk", "ONNX"),
        (b"", "ONNX"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ConversionError, match=said) as found:
        inspect(InspectJob(sources(tmp_path / "m.onnx")), lambda _fraction, _step: None)
    assert found.value.field == "sources"


def test_forms_of_different_nets_are_refused(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((4, 3, 16, 16), dtype=np.float32)
    torch.manual_seed(0)
    with quiet():
        export_onnx(Small().eval(), [images[:2]], tmp_path / "m.onnx", ["image"])
        export_tflite(Small().eval(), [images[:1]], tmp_path / "m.tflite")
    job = InspectJob(sources(tmp_path / "m.onnx", tmp_path / "m.tflite"), evaluation=data(tmp_path, image=images))
    with pytest.raises(ConversionError, match="not the same net") as found:
        inspect(job, lambda _fraction, _step: None)
    assert found.value.code == "forms_disagree"


class Wide(nn.Module):
    """Channels that differ in scale by six orders of magnitude, and compute what they would without that."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.out = nn.Linear(24, 6)
        with torch.no_grad():
            factor = torch.logspace(-spread / 2, spread / 2, 16)
            self.one.weight *= factor[:, None, None, None]
            self.one.bias *= factor
            self.two.weight /= factor[None, :, None, None]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.two(torch.relu(self.one(image))))
        return self.out(hidden.mean((2, 3)))  # type: ignore[no-any-return]


def test_channels_of_unlike_scale_survive_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Wide(spread=6.0).eval()
    images = np.random.default_rng(0).random((256, 3, 12, 12), dtype=np.float32)
    images *= np.random.default_rng(1).random((256, 3, 1, 1), dtype=np.float32) * 2
    with torch.no_grad():
        scores = net(torch.from_numpy(images))
        net.out.bias -= scores.mean(0)
        labels = net(torch.from_numpy(images)).argmax(1).numpy()
    with quiet():
        export_onnx(net, [images[:2]], tmp_path / "m.onnx", ["image"])
    result = built(
        tmp_path,
        BuildJob(
            sources(tmp_path / "m.onnx"),
            Target("p", RuntimeName.ONNX, ("cpu",), (Precision.INT8,), accuracy_drop_points=2.0),
            data(tmp_path, image=images[:128]),
            data(tmp_path, image=images, y=labels),
        ),
    )
    by_name = {one.recipe: one for one in result.candidates}
    plain, equal = by_name["onnx-static-u8s8"], by_name["onnx-equalized-u8s8"]
    assert plain.fate.startswith("over budget: loses")
    assert equal.measurements is not None, equal.error
    assert plain.measurements is not None
    assert (equal.measurements.accuracy or 0) >= 0.98
    assert equal.lineage is not None
    assert equal.lineage.passes[1].parameters["pairs"] == 1
    mixed = by_name["onnx-mixed-u8s8"]
    assert mixed.measurements is not None, mixed.error
    assert mixed.lineage is not None
    assert mixed.lineage.passes[-1].parameters["left_in_float"]
    assert result.chosen is not None
    assert result.candidates[result.chosen].within_budgets
