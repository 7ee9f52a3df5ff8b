"""An ONNX net as quantizers expect it, and computing what it did: they were written for fresh exports of one tool.

Strangers' nets have nodes without names, weights that are also inputs (as files did before 2019), weights in Constant
nodes or in half precision, functions of their own, and opsets from before weights could be quantized per channel, or
newer than kernels that quantize.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from converters.sources import nodes_of

PER_CHANNEL_OPSET = 13
RAISED_TO = 17
NO_LAYER = "the net has no layer that this recipe would quantize"
# Operators whose weights quantizers make integers of.
WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "Gather")
OLDEST_IR = 4  # the first whose weights need not be inputs
QUANTIZED_IR = 10  # old enough for every ONNX Runtime that has the opsets which need a look
_STANDARD = frozenset({"", "ai.onnx"})
_INTEGER_PARTS = ("Quantize", "Integer", "QLinear")  # in names of operators that quantizers put in
_DTYPE_ATTRIBUTES = frozenset({"to", "dtype"})


def tidied(source: Path, *, widen: bool = True) -> Any:
    """A file's net, tidied.

    Args:
        source: an ONNX file.
        widen: whether what is in half precision comes in single: integers are made from that only.
    """
    import onnx

    model = onnx.load(str(source))
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
    _settle_domains(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.input if value.name in constants]:
        model.graph.input.remove(value)
    model.ir_version = max(model.ir_version, OLDEST_IR)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_value") and size.dim_value < 0:
                size.Clear()
    _hoist_constants(model.graph)
    _free_outputs(model.graph)
    if widen and is_half(model):
        _widen(model)
    _fold_casts(model.graph)
    name_nodes(model)
    return model


def opset_of(model: Any) -> int:
    """The version of the standard operators."""
    return max((one.version for one in model.opset_import if one.domain in _STANDARD), default=1)


def for_quantizers(model: Any) -> Any:
    """The net with an opset that has weights quantized per channel, and kernels for what quantizers put in.

    As it is where that does not work out.
    """
    from onnx import version_converter

    opset = opset_of(model)
    wanted = _opset_for_quantizers(opset)
    if wanted == opset:
        return model
    try:
        other = version_converter.convert_version(model, wanted)
    except Exception:  # noqa: BLE001 (the converter lacks some operators; then it is quantized as well as it can be)
        return model
    return other if loads(other) else model


def _opset_for_quantizers(opset: int) -> int:
    if opset < PER_CHANNEL_OPSET:
        return RAISED_TO
    return next((one for one in range(opset, RAISED_TO - 1, -1) if _quantizes(one)), opset)


@functools.cache
def _quantizes(opset: int) -> bool:
    """Whether ONNX Runtime has kernels that quantize in an opset: those of the newest ones come a release later."""
    import onnx
    from onnx import helper

    scale = helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [1.0])
    zero = helper.make_tensor("zero", onnx.TensorProto.UINT8, [], [0])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph(nodes, "quantizes", [x], [y], [scale, zero])
    imports = [helper.make_opsetid("", opset)]
    return loads(helper.make_model(graph, opset_imports=imports, ir_version=QUANTIZED_IR))


def loads(model: Any) -> bool:
    """Whether ONNX Runtime takes a net."""
    return _session(model) is not None


def _session(model: Any) -> Any:
    """A session of a net as it is; None where ONNX Runtime does not take it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 (ONNX Runtime's errors have no common base)
        return None


def is_half(model: Any) -> bool:
    """Whether some of the net is in half precision."""
    import onnx

    return has_dtype(model, onnx.TensorProto.FLOAT16)


def has_dtype(model: Any, dtype: int) -> bool:
    """Whether some of the net, or of a graph within it, is of a dtype (`graph_has`)."""
    return any(graph_has(graph, dtype) for graph in _graphs(model.graph))


def check_quantized(before: Any, after: Any) -> None:
    """Refuse a net that a quantizer has left as it was: to call it one of integers would be wrong.

    Raises:
        ConversionError: `nothing_to_do`.
    """
    if _integer_nodes(after) <= _integer_nodes(before):
        raise ConversionError("nothing_to_do", NO_LAYER)


def _integer_nodes(model: Any) -> int:
    return sum(any(part in node.op_type for part in _INTEGER_PARTS) for node in nodes_of(model.graph.node))


def check_weights(model: Any, operators: Iterable[str] = WEIGHTED) -> None:
    """Refuse a net with NaN or infinity in the weights of some operators, before a quantizer stumbles over them.

    Elsewhere they may be meant: a mask is a constant of infinity that is chosen or added.

    Raises:
        ConversionError: `weights_not_finite`.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
    wanted = set(operators)
    read = {name for node in nodes_of(model.graph.node) if node.op_type in wanted for name in node.input}
    for tensor in (tensor for graph in _graphs(model.graph) for tensor in graph.initializer):
        if tensor.name in read and tensor.data_type in floats and not np.isfinite(numpy_helper.to_array(tensor)).all():
            raise not_finite(tensor.name)


def not_finite(name: str) -> ConversionError:
    """The refusal of a weight that holds NaN or infinity."""
    detail = (
        f"the weight {name!r} holds NaN or infinity, for which there are no integers: the net may have diverged in "
        "training; export it from an earlier checkpoint"
    )
    return ConversionError("weights_not_finite", detail)


def graph_has(graph: Any, dtype: int) -> bool:
    """Whether a graph has weights, inputs or results of casts of a dtype; graphs within it are not looked at."""
    return (
        any(tensor.data_type == dtype for tensor in graph.initializer)
        or any(value.type.tensor_type.elem_type == dtype for value in graph.input)
        or any(
            (attribute.name in _DTYPE_ATTRIBUTES and attribute.i == dtype)
            or (attribute.HasField("t") and attribute.t.data_type == dtype)
            for node in graph.node
            for attribute in node.attribute
        )
    )


def attributes_of(node: Any) -> dict[str, Any]:
    """A node's attributes as Python values, by name."""
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def type_values(model: Any) -> Any:
    """The net, with the dtype of every tensor of floats: quantizers pass over those of which none is declared.

    ONNX infers none behind operators that are not its own, such as scikit-learn's scalers and ONNX Runtime's fused
    layers; ONNX Runtime knows what those give. Where it does not load the net, that stays as it is.
    """
    import onnx

    graph = model.graph
    known = {value.name for value in (*graph.input, *graph.output, *graph.value_info)}
    unknown = [name for node in graph.node for name in node.output if name and name not in known]
    if not unknown:
        return model
    asked = type(model).FromString(model.SerializeToString())
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in unknown)
    session = _session(asked)
    for one in session.get_outputs() if session is not None else []:
        if one.name not in known and one.type == "tensor(float)":  # the others are not quantized
            graph.value_info.add(name=one.name).type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return model


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in nodes_of(graph.node):
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _settle_domains(model: Any) -> None:
    """The operator sets that are used, each once, and the standard one, which tools look for also where it is not.

    scikit-learn's converter declares the standard one twice in a net of trees alone, and that of boosted trees not at
    all.
    """
    from onnx import helper

    used = {node.domain for node in nodes_of(model.graph.node)} | _STANDARD
    versions: dict[str, int] = {}
    for one in model.opset_import:
        domain = "" if one.domain in _STANDARD else one.domain
        if one.domain in used:
            versions[domain] = max(one.version, versions.get(domain, 0))
    versions.setdefault("", RAISED_TO)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())


def _hoist_constants(graph: Any) -> None:
    """Weights in Constant nodes to where quantizers look for weights."""
    outputs = {value.name for value in graph.output}
    hoisted = []
    for node in graph.node:
        name = node.output[0] if node.op_type == "Constant" else ""
        tensor = next((one.t for one in node.attribute if one.name == "value"), None) if name else None
        if tensor is not None and name not in outputs:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = name
            hoisted.append(node)
    _remove(graph.node, hoisted)


def _free_outputs(graph: Any) -> None:
    """Weights that are answers too, behind an identity: tools rewrite weights in place."""
    from onnx import helper

    outputs = {value.name for value in graph.output}
    renamed = {}
    for tensor in graph.initializer:
        if tensor.name in outputs:
            renamed[tensor.name] = f"{tensor.name}::weight"
            tensor.name = renamed[tensor.name]
    if not renamed:
        return
    for node in nodes_of(graph.node):
        node.input[:] = [renamed.get(name, name) for name in node.input]
    graph.node.extend(helper.make_node("Identity", [inner], [name]) for name, inner in renamed.items())


def _fold_casts(graph: Any) -> None:
    """Weights that are cast before they are used, in the dtype they are used in."""
    from onnx import helper, numpy_helper

    outputs = {value.name for value in graph.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    folded = []
    for node in graph.node:
        if node.op_type != "Cast" or node.input[0] not in weights or node.output[0] in outputs:
            continue
        try:
            wanted = helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
            array = numpy_helper.to_array(weights[node.input[0]]).astype(wanted)
            made = numpy_helper.from_array(array, node.output[0])
        except (TypeError, ValueError, KeyError):  # dtypes that numpy has not, and strings
            continue
        if made.data_type != node.attribute[0].i:
            continue
        graph.initializer.append(made)
        weights[made.name] = made
        folded.append(node)
    _remove(graph.node, folded)
    used = {name for node in nodes_of(graph.node) for name in node.input} | outputs
    _remove(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in used])


def _remove(items: Any, gone: Iterable[Any]) -> None:
    wanted = {id(one) for one in gone}
    kept = [one for one in items if id(one) not in wanted]
    if len(kept) != len(items):
        copies = [type(one).FromString(one.SerializeToString()) for one in kept]
        del items[:]
        items.extend(copies)


def name_nodes(model: Any) -> None:
    """A name of its own for every node: tools find nodes by their names, and layers are left out by them."""
    taken: set[str] = set()
    for number, node in enumerate(nodes_of(model.graph.node)):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        while node.name in taken:
            node.name += "_"
        taken.add(node.name)


def _widen(model: Any) -> None:
    """Half precision to single; the net's own inputs and outputs keep their dtype, by casts."""
    import onnx
    from onnx import helper

    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    graph = model.graph
    edges = [[value.name for value in side if _is(value, half)] for side in (graph.input, graph.output)]
    for one in _graphs(graph):
        _widen_graph(one, with_edges=one is not graph)
    renamed = {name: f"{name}::single" for side in edges for name in side}
    for node in nodes_of(graph.node):
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    before = [helper.make_node("Cast", [name], [renamed[name]], to=single) for name in edges[0]]
    after = [helper.make_node("Cast", [renamed[name]], [name], to=half) for name in edges[1]]
    nodes = [*before, *(type(node).FromString(node.SerializeToString()) for node in graph.node), *after]
    del graph.node[:]
    graph.node.extend(nodes)


def _is(value: Any, dtype: int) -> bool:
    return bool(value.type.tensor_type.elem_type == dtype)


def _widen_graph(graph: Any, *, with_edges: bool) -> None:
    import onnx

    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.value_info, *graph.input, *graph.output) if with_edges else graph.value_info:
        if _is(value, half):
            value.type.tensor_type.elem_type = single
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.name in _DTYPE_ATTRIBUTES and attribute.i == half:
            attribute.i = single
        if attribute.HasField("t"):
            _widen_tensor(attribute.t)


def _widen_tensor(tensor: Any) -> None:
    import numpy as np
    import onnx
    from onnx import numpy_helper

    if tensor.data_type == onnx.TensorProto.FLOAT16:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
