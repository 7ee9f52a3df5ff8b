"""A net that can be cut anywhere: equal layers one after another, none of whose weights stands in two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_deep(path: Path, width: int, layers: int = 6) -> Path:
    """Write it, of `x` and `y`, both (rows, width) in float32."""
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for number in range(layers):
        weight = rng.normal(scale=width**-0.5, size=(width, width)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{number}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{number}"], [f"m{number}"]))
        name = "y" if number == layers - 1 else f"r{number}"
        nodes.append(helper.make_node("Tanh", [f"m{number}"], [name]))
    ends = [helper.make_tensor_value_info(one, TensorProto.FLOAT, ["n", width]) for one in ("x", "y")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
