"""Rescale channels between layers, without changing what the net computes, so that all survive 8 bits.

Cross-layer equalization: Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019. Where one layer feeds only the next one, through nothing but what commutes
with a positive factor a channel (ReLU, pooling), channel i of the first is divided by sqrt(r1/r2), and of the next
multiplied by it; r1 and r2 are the largest weights of channel i in each. Activations are rescaled with them.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import ConversionError
from converters.step import Context, Parameter

COMMUTES = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity"})
ROUNDS = 4
Weights = npt.NDArray[np.float32]


def equalize(
    source: Path, target: Path, _context: Context, _parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Equalize every pair of layers that allows it.

    Raises:
        ConversionError: when there is no such pair.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(source))
    weights = {
        tensor.name: numpy_helper.to_array(tensor).copy()
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    pairs = _pairs(model.graph, weights)
    if not pairs:
        raise ConversionError("nothing_to_do", "no layer of the net feeds another one alone: nothing can be equalized")
    for _ in range(ROUNDS):
        for first, second in pairs:
            _balance(first, second, weights)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    found["pairs"] = len(pairs)
    onnx.save(model, str(target))


def _pairs(graph: Any, weights: dict[str, Weights]) -> list[tuple[Any, Any]]:
    """Layers that feed one another alone, and whose weights nobody else uses."""
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    outputs = {value.name for value in graph.output}

    def alone(node: Any) -> bool:
        return all(len(readers[name]) == 1 for name in node.input[1:] if name in weights)

    found = []
    for node in graph.node:
        if not _is_layer(node, weights) or not alone(node):
            continue
        current = node
        while len(readers[current.output[0]]) == 1 and current.output[0] not in outputs:
            current = readers[current.output[0]][0]
            if current.op_type not in COMMUTES:
                break
        if current is not node and _is_layer(current, weights) and alone(current):
            pair = (node, current)
            if _out(node, weights).shape[0] == _in(current, weights).shape[0]:
                found.append(pair)
    return found


def _is_layer(node: Any, weights: dict[str, Weights]) -> bool:
    """Conv without groups, or Gemm with its weights the usual way round."""
    if node.op_type not in {"Conv", "Gemm"} or len(node.input) < 2 or node.input[1] not in weights:
        return False
    if len(node.input) > 2 and node.input[2] not in weights:
        return False
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Conv":
        return "group" not in attributes or attributes["group"].i == 1
    plain = all(attributes[name].f == 1.0 for name in ("alpha", "beta") if name in attributes)
    return plain and "transB" in attributes and attributes["transB"].i == 1 and "transA" not in attributes


def _out(node: Any, weights: dict[str, Weights]) -> Weights:
    """A layer's weights as (outputs, everything else)."""
    value = weights[node.input[1]]
    return value.reshape(value.shape[0], -1)


def _in(node: Any, weights: dict[str, Weights]) -> Weights:
    """A layer's weights as (inputs, everything else)."""
    value = np.moveaxis(weights[node.input[1]], 1, 0)
    return value.reshape(value.shape[0], -1)


def _balance(first: Any, second: Any, weights: dict[str, Weights]) -> None:
    ours, theirs = np.abs(_out(first, weights)).max(1), np.abs(_in(second, weights)).max(1)
    usable = (ours > 0) & (theirs > 0)
    factor = np.ones_like(ours)
    factor[usable] = np.sqrt(ours[usable] / theirs[usable])
    value = weights[first.input[1]]
    value /= factor.reshape(-1, *([1] * (value.ndim - 1)))
    if len(first.input) > 2:
        weights[first.input[2]] /= factor
    value = weights[second.input[1]]
    value *= factor.reshape(1, -1, *([1] * (value.ndim - 2)))
