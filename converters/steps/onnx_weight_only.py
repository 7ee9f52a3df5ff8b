"""ONNX with the weights of matrix products in 8 or 4 bits by blocks, and everything else in floating point.

ONNX Runtime's `MatMulNBits` (round to nearest). For nets whose time or size is in their matrix products. The quantizer
knows MatMul alone, so Gemm, as exporters write linear layers, becomes MatMul and Add before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from converters.step import Context, Parameter
from converters.steps.onnx_tidy import attributes_of, check_weights, tidied


def weight_only(
    source: Path, target: Path, _context: Context, parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Quantize constant weights of MatMul and Gemm.

    Raises:
        ConversionError: when the net has none, or when some are NaN or infinite.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = tidied(source)
    check_weights(model, ("MatMul", "Gemm"))
    split = split_gemms(model)
    double = {one.name for one in model.graph.initializer if one.data_type == onnx.TensorProto.DOUBLE}
    worker = MatMulNBitsQuantizer(
        model,
        bits=int(parameters["bits"] or 4),
        block_size=int(parameters["block"] or 32),
        is_symmetric=True,
        accuracy_level=4,  # 8-bit arithmetic where the CPU has it
        nodes_to_exclude=[node.name for node in model.graph.node if double.intersection(node.input)],
    )
    worker.process()
    changed = sum(node.op_type == "MatMulNBits" for node in worker.model.model.graph.node)
    if changed == 0:
        detail = "the net has no matrix product with constant weights: weight-only recipes have nothing to do"
        raise ConversionError("nothing_to_do", detail)
    found.update(changed=changed, of_gemm=split)
    onnx.save(worker.model.model, str(target))


def split_gemms(model: Any) -> int:
    """Write every Gemm that is a plain product with constant weights as MatMul and Add; returns how many there were."""
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes, turned, changed = [], dict[str, str](), 0
    for node in graph.node:
        if node.op_type != "Gemm" or node.input[1] not in constants or not _is_plain(node):
            nodes.append(node)
            continue
        changed += 1
        weight = node.input[1]
        if attributes_of(node).get("transB"):
            if weight not in turned:
                turned[weight] = f"{weight}_turned"
                value = numpy_helper.to_array(constants[weight])
                graph.initializer.append(numpy_helper.from_array(value.T.copy(), turned[weight]))
            weight = turned[weight]
        bias = list(node.input[2:3]) if len(node.input) > 2 and node.input[2] else []
        product = f"{node.output[0]}_product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name))
        if bias:
            name = f"{node.name}_bias" if node.name else ""
            nodes.append(helper.make_node("Add", [product, *bias], node.output[:1], name=name))
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph, turned)
    return changed


def _is_plain(node: Any) -> bool:
    attributes = attributes_of(node)
    return not attributes.get("transA") and all(attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta"))


def _drop_unused(graph: Any, turned: dict[str, str]) -> None:
    """Weights that nobody reads as they were; those that are inputs or outputs too stay."""
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # a graph within may read any of them
    read = {name for node in graph.node for name in node.input}
    read |= {value.name for value in (*graph.input, *graph.output)}
    kept = [tensor for tensor in graph.initializer if tensor.name not in turned or tensor.name in read]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
