"""Graphs reshaped for an execution provider: they answer as before, and ONNX Runtime makes of them what was meant."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from converters.errors import ConversionError
from converters.job import BuildJob, DataFile, SourceFile, Target
from converters.pipeline import build
from converters.step import Context, Parameter
from converters.steps.export import export_onnx, quiet
from converters.steps.onnx_fuse import fuse_attention, keep_sums

WORDS, WIDTH, HEADS = 50, 32, 4
IDS = np.random.default_rng(0).integers(0, WORDS, (48, 8))


class Encoder(nn.Module):
    """One layer of a text encoder, spelled out as most of them are."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.after, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.first(self.words(ids))
        rows, length, _ = x.shape

        def heads(one: torch.Tensor) -> torch.Tensor:
            return one.view(rows, length, HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)

        scores = heads(self.query(x)) @ heads(self.key(x)).transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        seen = (torch.softmax(scores, -1) @ heads(self.value(x))).permute(0, 2, 1, 3).reshape(rows, length, WIDTH)
        x = self.after(self.out(seen) + x)
        return self.last(self.narrow(nn.functional.gelu(self.wide(x))) + x).mean(1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "m.onnx"
    with quiet():
        export_onnx(Encoder().eval(), [IDS[:2]], path, ["ids"])
    return path


def context(folder: Path) -> Context:
    return Context(folder, None)


def answer(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"ids": IDS})[0])


def loaded(path: Path) -> Counter[str]:
    """Operators that ONNX Runtime runs of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".seen.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def test_residuals_stay_apart_from_the_normalization_after_them(tmp_path: Path, encoder: Path) -> None:
    found: dict[str, Parameter] = {}
    made = tmp_path / "made.onnx"
    keep_sums(encoder, made, context(tmp_path), {}, found)
    assert found == {"residuals": 2}
    np.testing.assert_allclose(answer(made), answer(encoder), atol=1e-5)
    # Why it is done: where this fails, ONNX Runtime has changed, and the candidate may be of no use any more.
    assert loaded(encoder)["SkipLayerNormalization"] == 2
    assert loaded(made)["SkipLayerNormalization"] == 0
    assert loaded(made)["LayerNormalization"] == 3


def spelled_out(path: Path, *, bias: bool) -> None:
    """A layer normalization in its parts, behind a residual, or behind a bias alone."""
    weights = [
        numpy_helper.from_array(np.eye(4, dtype=np.float32) * 2, "w"),
        numpy_helper.from_array(np.ones(4, np.float32), "b"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b" if bias else "x"], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["mean"], axes=[-1]),
        helper.make_node("Sub", ["sum", "mean"], ["off"]),
        helper.make_node("Mul", ["off", "off"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["var"], axes=[-1]),
        helper.make_node("Sqrt", ["var"], ["std"]),
        helper.make_node("Div", ["off", "std"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


def test_a_normalization_that_is_spelled_out_counts_and_a_bias_does_not(tmp_path: Path) -> None:
    found: dict[str, Parameter] = {}
    spelled_out(tmp_path / "residual.onnx", bias=False)
    keep_sums(tmp_path / "residual.onnx", tmp_path / "made.onnx", context(tmp_path), {}, found)
    assert found == {"residuals": 1}
    spelled_out(tmp_path / "bias.onnx", bias=True)
    with pytest.raises(ConversionError, match="no addition") as raised:
        keep_sums(tmp_path / "bias.onnx", tmp_path / "none.onnx", context(tmp_path), {}, {})
    assert raised.value.code == "nothing_to_do"
    assert not (tmp_path / "none.onnx").exists()


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 1e-2)])
def test_attention_is_fused_and_answers_alike(tmp_path: Path, encoder: Path, half: bool, tolerance: float) -> None:
    found: dict[str, Parameter] = {}
    made = tmp_path / "made.onnx"
    fuse_attention(encoder, made, context(tmp_path), {"half": half}, found)
    assert found["Attention"] == 1
    np.testing.assert_allclose(answer(made), answer(encoder), atol=tolerance)
    assert answer(made).dtype == np.float32
    assert (made.stat().st_size < 0.7 * encoder.stat().st_size) == half


def test_nets_without_attention_are_left_alone(tmp_path: Path) -> None:
    spelled_out(tmp_path / "m.onnx", bias=False)
    with pytest.raises(ConversionError, match="no attention") as raised:
        fuse_attention(tmp_path / "m.onnx", tmp_path / "made.onnx", context(tmp_path), {"half": False}, {})
    assert raised.value.code == "nothing_to_do"
    assert not (tmp_path / "made.onnx").exists()


@pytest.mark.parametrize("provider", ["cpu", "cuda", "openvino"])
def test_candidates_of_a_provider(tmp_path: Path, encoder: Path, provider: str) -> None:
    np.savez(tmp_path / "rows.npz", ids=IDS)
    (tmp_path / "work").mkdir()
    precisions = (Precision.FP32, Precision.FP16, Precision.DYNAMIC_INT8)
    job = BuildJob(
        (SourceFile(ModelFormat.ONNX, "0" * 64, str(encoder)),),
        Target("p", RuntimeName.ONNX, (provider,), precisions),
        None,
        DataFile("1" * 64, str(tmp_path / "rows.npz")),
    )
    result = build(job, tmp_path / "work", lambda _fraction, _step: None)
    own = [one for one in result.candidates if "sums" in one.recipe or "fused" in one.recipe]
    expected = {
        "cpu": [
            "onnx-sums-fp32",
            "onnx-sums-dynamic-matmul",
            "onnx-sums-dynamic-matmul-channels",
            "onnx-sums-dynamic-matmul-channels-s7",
        ],
        "cuda": ["onnx-fused-fp32", "onnx-fused-fp16"],
        "openvino": [],
    }
    assert [one.recipe for one in own] == expected[provider]
    for one in own:
        assert one.measurements is not None, one.error
        assert (one.measurements.fidelity or 0) > 0.98, one.recipe
        assert one.lineage is not None
        assert not one.same_as
