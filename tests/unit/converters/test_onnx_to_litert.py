"""ONNX to LiteRT without the tool: names, shapes, orders of axes and the reasons that it gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.trial.dataset import Dataset
from converters.errors import ConversionError
from converters.steps.onnx_to_litert import find_permutation, fix_shapes, last_words, tool_reason

ROWS = 4


def write(path: Path, *, listed: bool = False) -> None:
    """Two inputs with odd names and a free length, a hidden answer, an input that is an answer too."""
    weight = numpy_helper.from_array(np.eye(5, dtype=np.float32), "net_weight")
    values = [
        helper.make_tensor_value_info("images:0", TensorProto.FLOAT, ["batch", "length", 5]),
        helper.make_tensor_value_info("a b", TensorProto.FLOAT, ["batch", "length", 5]),
    ]
    if listed:
        values.append(helper.make_tensor_value_info("net_weight", TensorProto.FLOAT, [5, 5]))
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["images:0", "net_weight"], ["hidden"]),
            helper.make_node("Sub", ["hidden", "a b"], ["1"]),
            helper.make_node("Identity", ["a b"], ["same"]),
        ],
        "net",
        values,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", 5]) for name in ("1", "hidden")]
        + [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))


def rows() -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(
        {name: rng.standard_normal((ROWS, 7, 5)).astype(np.float32) for name in ("images:0", "a b")}, None, ROWS
    )


@pytest.mark.parametrize("listed", [False, True])
def test_plain_names_and_fixed_shapes_change_no_answer(tmp_path: Path, listed: bool) -> None:
    source, target, data = tmp_path / "source.onnx", tmp_path / "fixed.onnx", rows()
    write(source, listed=listed)
    fixed = fix_shapes(source, target, data)
    assert list(fixed.inputs.values()) == ["images:0", "a b"]
    assert list(fixed.outputs.values()) == ["1", "hidden", "same"]
    assert fixed.shapes == {"images:0": [1, 7, 5], "a b": [1, 7, 5]}
    assert not any(name.startswith("net_weight") for name in fixed.inputs)
    before, after = (onnxruntime.InferenceSession(str(path)) for path in (source, target))
    assert {value.name: value.shape for value in after.get_inputs()} == {key: [1, 7, 5] for key in fixed.inputs}
    one = {name: array[:1] for name, array in data.inputs.items()}
    expected = before.run(list(fixed.outputs.values()), one)
    found = after.run(list(fixed.outputs), {plain: one[name] for plain, name in fixed.inputs.items()})
    for wanted, value in zip(expected, found, strict=True):
        np.testing.assert_array_equal(value, wanted)
    assert source.exists()


def test_a_net_that_does_not_load_with_fixed_shapes(tmp_path: Path) -> None:
    source, data = tmp_path / "source.onnx", rows()
    write(source)
    data.inputs["a b"] = data.inputs["a b"][:, :3]
    with pytest.raises(ConversionError, match="push the version with a TFLite form"):
        fix_shapes(source, tmp_path / "fixed.onnx", data)


@pytest.mark.parametrize("order", [None, (0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 3, 2)])
def test_the_order_of_axes_is_found_also_where_all_are_as_long(order: tuple[int, ...] | None) -> None:
    source = np.random.default_rng(0).standard_normal((2, 5, 5, 5))
    assert find_permutation(source, source.transpose(order) if order else source) == order


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_the_order_stays_where_nothing_tells_them_apart(value: float) -> None:
    same = np.full((2, 5, 5, 5), value)
    assert find_permutation(same, same) is None


@pytest.mark.parametrize("shape", [(1, 4, 3), (1, 4), (1, 2, 3, 5)])
def test_no_order_gives_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConversionError, match=r"\[1, 2, 3, 4\]"):
        find_permutation(np.zeros((1, 2, 3, 4)), np.zeros(shape))


def test_reasons_are_one_line() -> None:
    text = (
        'ValueError: in layer "conv"\n\n`strides > 1` \x1b[31mnot supported\x1b[0m\n\nCall arguments received:\n • x=1'
    )
    assert tool_reason(text) == 'ValueError: in layer "conv" `strides > 1` not supported'
    assert tool_reason("") == ""
    assert last_words(b"one\n\x1b[1mtwo\x1b[0m\n \n") == "two"
    assert last_words(b"\n\xff\n") == "\N{REPLACEMENT CHARACTER}"
    assert last_words(b"") == "it ended without a word"
