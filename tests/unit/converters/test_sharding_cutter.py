"""Nets cut at every place that they can be cut at, compared with the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.errors import ConversionError
from converters.sharding.cutter import cut, largest_difference, run_stages
from converters.sharding.graph import Graph, open_session, read
from converters.steps.onnx_tidy import tidied

RNG = np.random.default_rng(7)


def _weight(name: str, *shape: int) -> Any:
    return numpy_helper.from_array(RNG.normal(size=shape).astype(np.float32), name)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any], opset: int = 17) -> Any:
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _value(name: str, *shape: Any, dtype: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def _skips(opset: int = 17) -> Any:
    """A residual, an input that is needed late, an early answer, reshapes by the batch's size, a shared weight."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["early"]),
        helper.make_node("MatMul", ["early", "w"], ["b"]),
        helper.make_node("Shape", ["b"], ["shape"]),
        helper.make_node("Constant", [], ["zero"], value=helper.make_tensor("z", 7, [1], [0])),
        helper.make_node("Gather", ["shape", "zero"], ["count"]),
        helper.make_node("Constant", [], ["two"], value=helper.make_tensor("t", 7, [2], [2, 4])),
        helper.make_node("Concat", ["count", "two"], ["folded"], axis=0),
        helper.make_node("Reshape", ["b", "folded"], ["c"]),
        helper.make_node("Tanh", ["c"], ["d"]),
        helper.make_node("Shape", ["x"], ["flat"]),
        helper.make_node("Reshape", ["d", "flat"], ["e"]),
        helper.make_node("Add", ["e", "early"], ["f"]),
        helper.make_node("Mul", ["f", "mask"], ["g"]),
        helper.make_node("MatMul", ["g", "v"], ["y"]),
    ]
    return _model(
        nodes,
        [_value("x", "n", 8), _value("mask", "n", 8)],
        [_value("y", "n", 3), _value("early", "n", 8)],
        [_weight("w", 8, 8), _weight("v", 8, 3)],
        opset,
    )


def _branches() -> Any:
    """An If that takes tensors from around it."""
    then = helper.make_graph([helper.make_node("MatMul", ["h", "v"], ["t"])], "then", [], [_value("t", "n", 8)])
    other = helper.make_graph([helper.make_node("Sub", ["h", "x"], ["o"])], "else", [], [_value("o", "n", 8)])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("If", ["yes"], ["i"], then_branch=then, else_branch=other),
        helper.make_node("Add", ["i", "r"], ["y"]),
    ]
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    return _model(nodes, [_value("x", "n", 8)], [_value("y", "n", 8)], [_weight("w", 8, 8), _weight("v", 8, 8), yes])


def _quantized() -> Any:
    """Two layers in QDQ form; one quantized tensor is needed twice."""
    nodes = []

    def layer(source: str, weight: str, target: str) -> None:
        nodes.append(helper.make_node("MatMul", [source, weight], [f"{target}_f"]))
        nodes.append(helper.make_node("QuantizeLinear", [f"{target}_f", "scale", "zp"], [f"{target}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{target}_q", "scale", "zp"], [target]))

    layer("x", "w1", "a")
    layer("a", "w2", "b")
    nodes.append(helper.make_node("Add", ["a", "b"], ["s"]))
    layer("s", "w3", "y")
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    zero = numpy_helper.from_array(np.uint8(128), "zp")
    weights = [_weight("w1", 8, 8), _weight("w2", 8, 8), _weight("w3", 8, 4), scale, zero]
    return _model(nodes, [_value("x", "n", 8)], [_value("y", "n", 4)], weights)


def _read(model: Any, tmp_path: Path, rows: int = 3) -> tuple[Graph, dict[str, Any]]:
    onnx.checker.check_model(model)
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    inputs = {}
    for value in model.graph.input:
        shape = [size.dim_value or rows for size in value.type.tensor_type.shape.dim]
        inputs[value.name] = RNG.normal(size=shape).astype(np.float32)
    return read(tidied(path, widen=False), inputs), inputs


@pytest.mark.parametrize("net", [_skips(), _skips(13), _branches(), _quantized()], ids=["skips", "old", "if", "qdq"])
def test_stages_answer_bit_for_bit_what_the_whole_answers_wherever_it_is_cut(net: Any, tmp_path: Path) -> None:
    graph, _ = _read(net, tmp_path)
    places = [place for place in range(1, len(graph.placed)) if graph.obstacle(place) is None]
    assert places
    tried = [[place] for place in places] + [[a, b] for a in places for b in places if a < b] + [places]
    session = open_session(net, plain=True)
    names = [value.name for value in session.get_outputs()]
    for rows in (1, 5):
        inputs = {value.name: RNG.normal(size=(rows, 8)).astype(np.float32) for value in net.graph.input}
        whole = dict(zip(names, session.run(names, inputs), strict=True))
        for positions in tried:
            stages = cut(graph, positions)
            for stage in stages:
                onnx.checker.check_model(stage, full_check=False)
            got = run_stages(stages, inputs, plain=True)[-1]
            assert list(got) == names
            assert all(np.array_equal(got[name], whole[name]) for name in names), positions
            assert largest_difference(run_stages(stages, inputs)[-1], whole) <= 1e-5
    placed = [node.name for index, node in enumerate(graph.model.graph.node) if index in graph.placed]
    for positions in tried:
        held = [node.name for stage in cut(graph, positions) for node in stage.graph.node if node.name in set(placed)]
        assert sorted(held) == sorted(placed), "every node in exactly one stage"


def test_a_stage_holds_its_own_weights_only(tmp_path: Path) -> None:
    graph, _ = _read(_quantized(), tmp_path)
    first, second = cut(graph, [2])
    assert {one.name for one in first.graph.initializer} == {"w1", "scale", "zp"}
    assert "w1" not in {one.name for one in second.graph.initializer}


def test_what_crosses_a_quantized_net_is_a_byte_a_number(tmp_path: Path) -> None:
    graph, _ = _read(_quantized(), tmp_path)
    chain = graph.chain({}, quantized=True)
    inner = [position for position in range(1, len(graph.placed)) if np.isfinite(chain.crossing[position])]
    assert inner == [2, 4]  # not at the sum, which is in floating point
    assert [chain.crossing[position] for position in inner] == [8, 16]
    assert cut(graph, [2])[1].graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8


def test_a_net_that_cannot_be_cut_says_why(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["w", "t"], ["u"]),
        helper.make_node("Transpose", ["u"], ["y"], perm=[1, 0]),
    ]
    net = _model(nodes, [_value("x", "n", 8)], [_value("y", "n", 8)], [_weight("w", 8, 8)])
    graph, _ = _read(net, tmp_path)
    with pytest.raises(ConversionError, match=r"can't be cut anywhere: the first axis of '.' does not count rows"):
        graph.chain({})
    with pytest.raises(ConversionError, match="can't be cut before node 1"):
        cut(graph, [1])
    with pytest.raises(ConversionError, match="no ascending places"):
        cut(graph, [0])


def test_chance_and_nets_without_weights_are_refused(tmp_path: Path) -> None:
    net = _model(
        [helper.make_node("RandomNormalLike", ["x"], ["r"]), helper.make_node("Mul", ["r", "w"], ["y"])],
        [_value("x", "n", 8)], [_value("y", "n", 8)], [_weight("w", 8)],
    )  # fmt: skip
    with pytest.raises(ConversionError, match="by chance"):
        _read(net, tmp_path)
    bare = _model([helper.make_node("Relu", ["x"], ["y"])], [_value("x", "n", 8)], [_value("y", "n", 8)], [])
    with pytest.raises(ConversionError, match="no weights"):
        _read(bare, tmp_path)
