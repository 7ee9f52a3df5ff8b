"""Builds the stages' models of a net that was read, and proves that they answer together what the net answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agent.trial.dataset import Array
from converters.errors import ConversionError
from converters.sharding.graph import ROWS, Graph, Tensor, makers_of, needed_by, open_session, rows_nodes

TOLERANCE = 1e-5
PROTOBUF_LIMIT = (2 << 30) - 1


def cut(graph: Graph, positions: Sequence[int]) -> list[Any]:
    """Stages of a net as models; each takes what the one before gives, by the same names and in the same order.

    What a later stage needs of an earlier one is passed through the stages between. The first takes the net's inputs,
    the last gives its outputs.

    Args:
        graph: the net.
        positions: between its placed nodes, ascending, without both ends.

    Raises:
        ConversionError: `not_shardable`, naming what is in the way.
    """
    count = len(graph.placed)
    inner = list(positions)
    if inner != sorted(set(inner)) or any(not 0 < one < count for one in inner):
        raise ConversionError(
            "not_shardable", f"stages: {inner} are no ascending places between 0 and {count}", "stages"
        )
    for position in inner:
        obstacle = graph.obstacle(position)
        if obstacle is not None:
            raise ConversionError(
                "not_shardable", f"sources: it can't be cut before node {position}: {obstacle}", "sources"
            )
    bounds = [0, *inner, count]
    return [_stage(graph, bounds, number) for number in range(len(bounds) - 1)]


def boundary_names(graph: Graph, bounds: Sequence[int], boundary: int) -> dict[str, str]:
    """How the tensors that pass a boundary are called there, by their names in the net.

    A stage can't give what it takes under the same name: what passes through alternates between two. A name of the
    net's outputs is given by the last stage alone.
    """
    names = graph.crossing[bounds[boundary]]
    if boundary in {0, len(bounds) - 1}:
        return {name: name for name in names}
    outputs = set(graph.crossing[-1])
    found = {}
    for name in names:
        alternate = sum(name in graph.crossing[bounds[one]] for one in range(boundary)) % 2
        marks = ("::even", "::odd") if name in outputs else ("", "::passed")
        found[name] = name + marks[alternate]
    return found


def _stage(graph: Graph, bounds: list[int], number: int) -> Any:
    import onnx
    from onnx import helper

    source = graph.model.graph
    makers = makers_of(source)
    taken = boundary_names(graph, bounds, number)
    given = boundary_names(graph, bounds, number + 1)
    wanted = _nodes(graph, bounds[number], bounds[number + 1], [*given], makers)
    nodes: list[Any] = []
    nodes += [
        helper.make_node("Identity", [wire], [name], name=f"{wire}::in") for name, wire in taken.items() if wire != name
    ]
    needed = {name for index in wanted for name in needed_by(source.node[index])} | set(given)
    if ROWS in needed:
        nodes += rows_nodes(graph.model, next(wire for name, wire in taken.items() if graph.tensors[name].rows))
    nodes += [source.node[index] for index in wanted]
    nodes += [
        helper.make_node("Identity", [name], [wire], name=f"{wire}::out")
        for name, wire in given.items()
        if wire != name
    ]
    weights = [tensor for tensor in source.initializer if tensor.name in needed]
    declared = {value.name: value for value in (*source.input, *source.output)}
    made = helper.make_graph(
        nodes,
        f"{source.name or 'net'}_{number + 1}"[:100],
        [_value(wire, graph.tensors[name], declared.get(name)) for name, wire in taken.items()],
        [_value(wire, graph.tensors[name], declared.get(name)) for name, wire in given.items()],
        weights,
    )
    made.sparse_initializer.extend(one for one in source.sparse_initializer if one.values.name in needed)
    model = helper.make_model(made, opset_imports=list(graph.model.opset_import), ir_version=graph.model.ir_version)
    model.producer_name = "shoal"
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise ConversionError(
            "not_shardable", f"stages: stage {number + 1} is larger than 2 GiB: take more stages", "stages"
        )
    assert isinstance(model, onnx.ModelProto)
    return model


def _nodes(graph: Graph, start: int, end: int, given: list[str], makers: dict[str, int]) -> list[int]:
    """Placed nodes of a stage and the repeated ones that it needs, in the graph's order."""
    source = graph.model.graph
    found = set(graph.placed[start:end])
    waiting = [*found, *(makers[name] for name in given if makers.get(name) in graph.repeated)]
    found |= set(waiting)
    while waiting:
        for name in needed_by(source.node[waiting.pop()]):
            maker = makers.get(name)
            if maker is not None and maker in graph.repeated and maker not in found:
                found.add(maker)
                waiting.append(maker)
    return sorted(found)


def _value(name: str, tensor: Tensor, declared: Any) -> Any:
    """What a stage declares of a tensor: as the net does, or as it was seen."""
    from onnx import helper

    if declared is not None and declared.type.WhichOneof("value") == "tensor_type":
        value = type(declared).FromString(declared.SerializeToString())
        value.name = name
        return value
    return helper.make_tensor_value_info(name, tensor.dtype, [None if size < 0 else size for size in tensor.shape])


def run_stages(stages: Sequence[Any], inputs: dict[str, Array], *, plain: bool = False) -> list[dict[str, Array]]:
    """What every stage gives, one after the other."""
    found = []
    for stage in stages:
        session = open_session(stage, plain=plain)
        names = [value.name for value in session.get_outputs()]
        inputs = dict(zip(names, session.run(names, inputs), strict=True))
        found.append(inputs)
    return found


def largest_difference(mine: dict[str, Array], whole: dict[str, Array]) -> float:
    """The largest difference of two answers, relative to the largest number of an output where that is over 1.

    Raises:
        ConversionError: `stages_differ`, when they differ by more than `TOLERANCE`, or in shape or dtype.
    """
    largest = 0.0
    for name, value in whole.items():
        got = mine[name]
        if got.shape != value.shape or got.dtype != value.dtype:
            raise _differ(
                f"{name!r} is {got.dtype} {list(got.shape)}, the whole net's {value.dtype} {list(value.shape)}"
            )
        if np.array_equal(got, value, equal_nan=value.dtype.kind == "f"):
            continue
        if value.dtype.kind in "OUS":
            raise _differ(f"{name!r} has other texts")
        scale = max(1.0, float(np.nanmax(np.abs(value.astype(np.float64)))))
        difference = float(np.abs(got.astype(np.float64) - value.astype(np.float64)).max()) / scale
        if not difference <= TOLERANCE:
            raise _differ(f"{name!r} differs by {difference:.3g}, at most {TOLERANCE:g} is rounding")
        largest = max(largest, difference)
    return largest


def _differ(said: str) -> ConversionError:
    return ConversionError(
        "stages_differ", f"sources: the stages do not answer what the net answers: {said}: cut it elsewhere", "sources"
    )
