"""Which layers hurt when they are quantized, and what is done about nets that are too slow to try them all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.trial.dataset import Dataset
from converters.step import Context, Parameter
from converters.steps import onnx_sensitivity
from converters.steps.onnx_dynamic import dynamic_int8, mixed_dynamic
from converters.steps.onnx_sensitivity import (
    LEAST_ROWS,
    agreement_of,
    answers_of,
    left_in_float,
    ordered_by_harm,
    relative_error,
)
from tests.fleet import write_classifier

GROUPS = [["a"], ["b"], ["c"]]


def test_the_most_harmful_come_first() -> None:
    """A group's harm is what is lost when all others stay in floating point."""
    left: dict[str, float] = {"a": 0.1, "b": 0.7, "c": 0.2}
    found: dict[str, Parameter] = {}
    ordered = ordered_by_harm(GROUPS, lambda others: left[({"a", "b", "c"} - set(others)).pop()], found)
    assert ordered == [["b"], ["c"], ["a"]]
    assert found == {}


def test_as_few_as_it_takes_stay_in_floating_point() -> None:
    ordered = [["b", "b2"], ["c"], ["a"]]
    tried: list[list[str]] = []
    found: dict[str, Parameter] = {}
    assert left_in_float(ordered, lambda left: tried.append(left) or len(left) > 2, found)
    assert tried == [["b", "b2"], ["b", "b2", "c"]]
    assert found == {"layers": 4, "left_in_float": 3}
    nothing: dict[str, Parameter] = {}
    assert not left_in_float(ordered, lambda left: "a" in left, nothing), "half of the groups at most"
    assert nothing == {}


def test_what_is_not_tried_in_time_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_sensitivity, "TRYING_SECONDS", -1.0)
    found: dict[str, Parameter] = {}
    ordered = ordered_by_harm(GROUPS, lambda _: 1.0, found)
    assert sorted(ordered) == GROUPS
    assert found == {"groups_not_tried": 3}


def test_a_slow_net_answers_fewer_rows_and_they_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classifier(tmp_path / "m.onnx", hidden=16)
    rows = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    context = Context(tmp_path, Dataset({"x": rows}, None, 64))
    whole = answers_of(tmp_path / "m.onnx", context, 64)
    monkeypatch.setattr(onnx_sensitivity, "ANSWER_SECONDS", -1.0)
    few = answers_of(tmp_path / "m.onnx", context, 64)
    assert (len(whole), len(few)) == (64, LEAST_ROWS)
    assert relative_error(whole, few) == 0.0
    assert agreement_of(whole, few) == 1.0
    assert relative_error(whole, few + 1) > 0.0


def unlike_channels(path: Path) -> None:
    """Two matrix products; between them one channel is a thousand times as large as the others, and tells nothing."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((16, 16)).astype(np.float32) for _ in range(2))
    first[:, 0] *= 1000
    second[0] = 0
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["m"], name="even"),
        helper.make_node("MatMul", ["m", "second"], ["y"], name="uneven"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 16]) for name in "xy"]
    weights = [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], weights), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 9
    onnx.save(model, str(path))


def test_mixed_dynamic_leaves_the_product_that_hurts(tmp_path: Path) -> None:
    source, plain, mixed = (tmp_path / f"{name}.onnx" for name in ("m", "plain", "mixed"))
    unlike_channels(source)
    rows = np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32)
    context = Context(tmp_path, Dataset({"x": rows}, None, 64))
    expected = answers_of(source, context, 64)
    dynamic_int8(source, plain, context, {"operators": "MatMul", "per_channel": True, "weight_bits": 8}, {})
    assert relative_error(expected, answers_of(plain, context, 64)) > 0.01
    found: dict[str, Parameter] = {}
    mixed_dynamic(source, mixed, context, {"per_channel": True, "weight_bits": 8}, found)
    assert relative_error(expected, answers_of(mixed, context, 64)) <= 0.01
    assert (found["layers"], found["left_in_float"]) == (2, 1)
    assert [node.op_type for node in onnx.load(str(mixed)).graph.node].count("MatMul") == 1
