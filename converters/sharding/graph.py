"""An ONNX graph as a chain: which nodes are placed in a stage, what passes each position, and why some can't be cut.

Two kinds of nodes:

- *placed*: in exactly one stage, in the graph's order;
- *repeated*: in every stage that needs them, as they cost little: those that compute from weights and the number of
  rows alone, and DequantizeLinear, so that what crosses is the quantized tensor, a quarter of the bytes.

A tensor may cross when its first axis counts rows, which is tried, not guessed: the net is run on two numbers of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.runtimes.base import reason
from agent.trial.dataset import Array
from converters.errors import ConversionError
from converters.package import ONNX_DTYPES as DTYPES
from converters.sharding.planner import Chain
from converters.sources import nodes_of
from converters.steps.onnx_tidy import opset_of

ROWS = "shoal::rows"  # stands for the number of rows, which each stage counts itself
SHAPE_WITH_RANGE_OPSET = 15
_BYTES = frozenset({2, 3, 9})  # uint8, int8, bool
_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


@dataclass(frozen=True)
class Tensor:
    """A tensor as it was seen.

    Attributes:
        dtype: ONNX's number of it; 0 where it is no plain tensor.
        shape: with -1 where runs differed.
        row_bytes: of one row; of all, where it has no rows.
        rows: whether its first axis counts rows.
    """

    dtype: int
    shape: tuple[int, ...]
    row_bytes: int
    rows: bool


@dataclass(frozen=True)
class Graph:
    """A net, read for cutting.

    Attributes:
        model: `onnx.ModelProto`, tidied: its nodes have names of their own.
        placed: indices of its nodes that are in one stage each, in order.
        repeated: indices of those that are in every stage that needs them.
        tensors: by name, of inputs and of what nodes give.
        needs: by place in `placed`: tensors from inputs or placed nodes that the node needs, by itself or through
            repeated ones.
        crossing: by position (0 to len(placed)): tensors that pass it, in a fixed order.
    """

    model: Any
    placed: tuple[int, ...]
    repeated: frozenset[int]
    tensors: dict[str, Tensor]
    needs: tuple[frozenset[str], ...]
    crossing: tuple[tuple[str, ...], ...]

    def obstacle(self, position: int) -> str | None:
        """Why it can't be cut at a position; None where it can."""
        names = self.crossing[position]
        if not names:
            return "nothing passes from what is before to what is after"
        for name in names:
            tensor = self.tensors[name]
            if tensor.dtype not in DTYPES:
                return f"{name[:80]!r} is no tensor that can be sent"
            if not tensor.rows:
                return f"the first axis of {name[:80]!r} does not count rows"
        return None

    def quantized(self, position: int) -> bool:
        """Whether only integers of one byte pass a position, beside the net's own inputs."""
        inputs = set(self.crossing[0])
        return all(name in inputs or self.tensors[name].dtype in _BYTES for name in self.crossing[position])

    def chain(self, seconds: dict[str, float], *, quantized: bool = False) -> Chain:
        """As the planner takes it.

        Args:
            seconds: by node's name, for one row.
            quantized: whether it may be cut at quantized tensors alone, where it has some.

        Raises:
            ConversionError: `not_shardable`, when it can be cut nowhere.
        """
        nodes = self.model.graph.node
        count = len(self.placed)
        crossing = np.full(count + 1, np.inf)
        obstacles: dict[str, int] = {}
        for position in range(count + 1):
            obstacle = self.obstacle(position) if 0 < position < count else None
            if obstacle is None:
                crossing[position] = sum(self.tensors[name].row_bytes for name in self.crossing[position])
            else:
                obstacles[obstacle] = obstacles.get(obstacle, 0) + 1
        if quantized:
            kept = [not 0 < position < count or self.quantized(position) for position in range(count + 1)]
            if np.isfinite(crossing[kept][1:-1]).any():
                crossing[~np.array(kept)] = np.inf
        if count < 2 or (obstacles and not np.isfinite(crossing[1:-1]).any()):
            said = max(obstacles, key=lambda one: obstacles[one]) if obstacles else "it has a single node"
            raise ConversionError(
                "not_shardable",
                f"sources: the net can't be cut anywhere: {said}; export it with a free batch",
                "sources",
            )
        live = np.zeros(count)
        for place, index in enumerate(self.placed):
            held = set(self.crossing[place]) | set(self.crossing[place + 1]) | set(nodes[index].output)
            live[place] = sum(self.tensors[name].row_bytes for name in held if name in self.tensors)
        return Chain(
            seconds=np.array([seconds.get(nodes[index].name, 0.0) for index in self.placed]),
            live=live,
            weights=tuple(self._weights()),
            crossing=crossing,
        )

    def _weights(self) -> Iterable[tuple[int, tuple[int, ...]]]:
        makers = makers_of(self.model.graph)
        users: dict[str, list[int]] = {}
        for place, index in enumerate(self.placed):
            for name in reached(self.model.graph, index, makers, self.repeated):
                users.setdefault(name, []).append(place)
        for tensor in self.model.graph.initializer:
            if tensor.name in users:
                yield tensor_bytes(tensor), tuple(users[tensor.name])


def tensor_bytes(tensor: Any) -> int:
    """Bytes of a weight."""
    from onnx import helper

    try:
        size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        size = 4
    return int(np.prod(tensor.dims, dtype=np.int64)) * int(size)


def read(model: Any, inputs: dict[str, Array]) -> Graph:
    """A net, read for cutting. What is given is changed: Shape nodes ask for the number of rows where that is enough.

    Args:
        model: tidied.
        inputs: rows to see its tensors on; three where the first axes are free, else as many as the net takes.

    Raises:
        ConversionError: `not_shardable`.
    """
    graph = model.graph
    if any(node.op_type in _RANDOM for node in nodes_of(graph.node)):
        raise _refused("it draws numbers by chance, so its stages can't be compared with it: export it for inference")
    if sum(tensor_bytes(one) for one in graph.initializer) == 0:
        raise _refused("it has no weights, so there is nothing to divide")
    tensors = seen_tensors(model, inputs)
    replace_shapes(model, tensors)
    constants = {tensor.name for tensor in graph.initializer} | {ROWS}
    repeated = _repeated(graph, constants)
    placed = tuple(index for index in range(len(graph.node)) if index not in repeated)
    makers = makers_of(graph)
    needs = tuple(frozenset(reached(graph, index, makers, repeated) - constants) for index in placed)
    born = {value.name: 0 for value in graph.input}
    for place, index in enumerate(placed):
        born |= {name: place + 1 for name in graph.node[index].output if name}
    until: dict[str, int] = {}
    for place, names in enumerate(needs):
        until |= dict.fromkeys(names, place)
    for value in graph.output:
        maker = makers.get(value.name)
        if maker in repeated:
            until |= dict.fromkeys(reached(graph, maker, makers, repeated) - constants, len(placed))
        else:
            until[value.name] = len(placed)
    crossing = [
        tuple(name for name, start in born.items() if start <= position <= until.get(name, -1))
        for position in range(len(placed) + 1)
    ]
    crossing[0] = tuple(value.name for value in graph.input)
    crossing[-1] = tuple(value.name for value in graph.output)
    return Graph(model, placed, repeated, tensors, needs, tuple(crossing))


def _refused(said: str) -> ConversionError:
    return ConversionError("not_shardable", f"sources: the net can't be cut: {said}", "sources")


def makers_of(graph: Any) -> dict[str, int]:
    """Which node gives a tensor."""
    return {name: index for index, node in enumerate(graph.node) for name in node.output if name}


def needed_by(node: Any) -> set[str]:
    """Names of tensors that a node takes from around it, those of graphs within it among them."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            taken: set[str] = {value.name for value in graph.output}
            for inner in graph.node:
                taken |= needed_by(inner)
                own |= set(inner.output)
            names |= taken - own
    return names


def reached(graph: Any, index: int, makers: dict[str, int], repeated: frozenset[int]) -> set[str]:
    """Weights and results of placed nodes that a node needs, by itself and through repeated nodes."""
    found: set[str] = set()
    waiting, seen = [index], {index}
    while waiting:
        for name in needed_by(graph.node[waiting.pop()]):
            maker = makers.get(name)
            if maker is None or maker not in repeated:
                found.add(name)
            elif maker not in seen:
                seen.add(maker)
                waiting.append(maker)
    return found


def _repeated(graph: Any, constants: set[str]) -> frozenset[int]:
    """Nodes that compute from weights and the number of rows alone, and dequantizers."""
    constant = set(constants)
    found = set()
    for index, node in enumerate(graph.node):
        if needed_by(node) <= constant:
            constant |= set(node.output)
            found.add(index)
        elif node.op_type == "DequantizeLinear" and set(node.input[1:]) <= constant:
            found.add(index)
    return frozenset(found)


def rows_nodes(model: Any, tensor: str) -> list[Any]:
    """Nodes that give `ROWS`, the number of rows as (1,) int64, of a tensor whose first axis counts them."""
    from onnx import helper

    if opset_of(model) >= SHAPE_WITH_RANGE_OPSET:
        return [helper.make_node("Shape", [tensor], [ROWS], name=ROWS, start=0, end=1)]
    zero = helper.make_node(
        "Constant", [], [f"{ROWS}::zero"], name=f"{ROWS}::zero", value=helper.make_tensor("zero", 7, [1], [0])
    )
    return [
        zero,
        helper.make_node("Shape", [tensor], [f"{ROWS}::shape"], name=f"{ROWS}::shape"),
        helper.make_node("Gather", [f"{ROWS}::shape", f"{ROWS}::zero"], [ROWS], name=ROWS, axis=0),
    ]


def replace_shapes(model: Any, tensors: dict[str, Tensor]) -> None:
    """Let Shape ask for the number of rows where the rest is known: then no stage needs another's tensor for it.

    The rest is known where it was the same in all runs and no input has another free axis.
    """
    from onnx import helper

    graph = model.graph
    fixed = all(
        len(tensors[value.name].shape) and -1 not in tensors[value.name].shape[1:] for value in graph.input
    ) and all(size.HasField("dim_value") for value in graph.input for size in value.type.tensor_type.shape.dim[1:])
    nodes = []
    for node in graph.node:
        tensor = tensors.get(node.input[0]) if node.op_type == "Shape" else None
        if tensor is None or not tensor.rows:
            nodes.append(node)
            continue
        attributes = {one.name: one.i for one in node.attribute}
        axes = list(range(len(tensor.shape)))[attributes.get("start", 0) : attributes.get("end", len(tensor.shape))]
        rest = [tensor.shape[axis] for axis in axes if axis > 0]
        if not axes or (rest and (not fixed or -1 in rest)):
            nodes.append(node)
            continue
        if not rest:
            nodes.append(helper.make_node("Identity", [ROWS], [node.output[0]], name=node.name))
            continue
        known = f"{node.output[0]}::known"
        graph.initializer.append(helper.make_tensor(known, 7, [len(rest)], rest))
        parts = [ROWS, known] if 0 in axes else [known]
        nodes.append(helper.make_node("Concat", parts, [node.output[0]], name=node.name, axis=0))
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def seen_tensors(model: Any, inputs: dict[str, Array]) -> dict[str, Tensor]:
    """Every tensor of the net, as runs on all given rows and on one row less give it (on all alone, where one is all).

    Raises:
        ConversionError: `bad_model`, when it does not run on them.
    """
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    own = {value.name for value in probe.graph.output}
    for node in model.graph.node:
        probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name and name not in own)
    names = [value.name for value in probe.graph.output]
    session = open_session(probe, plain=True)
    rows = {name: len(array) for name, array in inputs.items() if array.ndim}
    count = next(iter(rows.values()), 0)
    free = count > 1 and len(rows) == len(inputs) and set(rows.values()) == {count}
    runs = [dict(zip(names, _run(session, names, inputs), strict=True)) | inputs]
    if free:
        fewer = {name: array[: count - 1] for name, array in inputs.items()}
        runs.append(dict(zip(names, _run(session, names, fewer), strict=True)) | fewer)
    return {name: _tensor([run[name] for run in runs], count, free=free) for name in (*inputs, *names)}


def _tensor(values: list[Any], count: int, *, free: bool) -> Tensor:
    from onnx import helper

    first = values[0]
    if not all(isinstance(value, np.ndarray) and value.ndim == first.ndim for value in values):
        return Tensor(0, (), 0, rows=False)
    try:
        dtype = 8 if first.dtype.kind in "OU" else int(helper.np_dtype_to_tensor_dtype(first.dtype))
    except (KeyError, ValueError):
        dtype = 0
    same = zip(*(value.shape for value in values), strict=True)
    shape = tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in same)
    rows = bool(first.ndim) and all(len(value) == count - less for less, value in enumerate(values))
    shared = max(count, 1) if rows else 1
    return Tensor(dtype, (-1, *shape[1:]) if rows and free else shape, -(-first.nbytes // shared), rows)


def open_session(model: Any, *, plain: bool, profile: str = "") -> Any:
    """A session of ONNX Runtime on one thread.

    Args:
        model: `onnx.ModelProto`.
        plain: whether its nodes stay as they are; else they are optimized as on a device.
        profile: path that timings of nodes are written to; none are taken where it is empty.

    Raises:
        ConversionError: `bad_model`, when it does not load.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors have no common base)
        raise ConversionError("bad_model", f"sources: ONNX Runtime can't load it: {reason(error)}", "sources") from None


def _run(session: Any, names: list[str], inputs: dict[str, Array]) -> list[Any]:
    try:
        return list(session.run(names, inputs))
    except Exception as error:  # noqa: BLE001 (ONNX Runtime's errors have no common base)
        raise ConversionError(
            "bad_model", f"sources: it does not run on its rows: {reason(error)}", "sources"
        ) from None
