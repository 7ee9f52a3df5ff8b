"""A mean over all of an image's pixels as the pooling operator that it is.

Exporters write such a mean as `ReduceMean` over axes 2 and 3. ONNX Runtime's quantizer leaves that in floating point
and keeps `GlobalAveragePool` in integers, and both compute the same.
"""

from __future__ import annotations

from typing import Any

from converters.steps.onnx_tidy import attributes_of

SPATIAL = {2, 3}
RANK = 4


def pool_means(model: Any) -> int:
    """Rewrite such means in a model whose shapes are inferred; returns how many there were."""
    import onnx

    graph = model.graph
    known = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    nodes, changed = [], 0
    for node in graph.node:
        keeps = attributes_of(node).get("keepdims", 1)
        value = known.get(node.input[0]) if node.op_type == "ReduceMean" else None
        if value is None or not _is_images(value) or _axes(node, graph) != SPATIAL:
            nodes.append(node)
            continue
        changed += 1
        pooled = node.output[0] if keeps else f"{node.output[0]}_pooled"
        nodes.append(onnx.helper.make_node("GlobalAveragePool", node.input[:1], [pooled], name=node.name))
        if not keeps:
            # Not Reshape or Squeeze: this one is spelled alike in every opset.
            name = f"{node.name}_flatten" if node.name else ""
            nodes.append(onnx.helper.make_node("Flatten", [pooled], node.output[:1], name=name, axis=1))
    if changed:
        del graph.node[:]
        graph.node.extend(nodes)
    return changed


def _is_images(value: Any) -> bool:
    """Whether a tensor is known to have four axes and floating point numbers: pooling takes no others."""
    import onnx

    kind = value.type.tensor_type
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    return kind.elem_type in floats and kind.HasField("shape") and len(kind.shape.dim) == RANK


def _axes(node: Any, graph: Any) -> set[int] | None:
    """The axes of a mean of four axes, an attribute before opset 18 and a constant input since; None when unknown."""
    from onnx import numpy_helper

    listed = attributes_of(node).get("axes")
    if len(node.input) > 1 and node.input[1]:
        constants = [one for one in graph.initializer if one.name == node.input[1]]
        constants += [
            attribute.t
            for one in graph.node
            if one.op_type == "Constant" and one.output[0] == node.input[1]
            for attribute in one.attribute
            if attribute.name == "value"
        ]
        listed = numpy_helper.to_array(constants[0]).tolist() if constants else None
    if listed is None:
        return None
    return {axis + RANK if axis < 0 else axis for axis in listed}
