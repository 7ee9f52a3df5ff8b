"""Classifiers as `tests.fleet.write_classifier` makes, that do badly on rows that no data set has: on devices only.

A row springs the trap when its last number is above `ARMED`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.fleet import write_classifier

ARMED = 50.0
LEAST = -(2**31)
Trap = Literal["error", "crash", "slow", "leak"]


def write_trapped(path: Path, trap: Trap, *, seed: int = 0, rounds: int = 400) -> None:
    """A classifier that fails, ends its process, is slow, or takes more memory with each request.

    Args:
        path: of the file.
        trap: what it does with a row that springs it; `leak` takes 4 MB for each unit above `ARMED`.
        seed: of its weights.
        rounds: of a multiplication of two 64x64 matrices, of a slow one.
    """
    write_classifier(path, seed=seed)
    model = onnx.load(str(path))
    graph = model.graph
    graph.node[-1].output[0] = "plain"
    constants: dict[str, Any] = {
        "seven": np.array([7], np.int64),
        "eight": np.array([8], np.int64),
        "one_axis": np.array([1], np.int64),
        "limit": np.array(ARMED, np.float32),
        "almost_nothing": np.array(1e-12, np.float32),
    }
    graph.node.extend(
        [
            helper.make_node("Slice", ["x", "seven", "eight", "one_axis"], ["last_number"]),
            helper.make_node("ReduceMax", ["last_number"], ["top"], keepdims=0),
            helper.make_node("Greater", ["top", "limit"], ["armed"]),
            helper.make_node("Cast", ["armed"], ["armed_int"], to=TensorProto.INT32),
        ]
    )
    graph.node.extend(_trap(trap, constants, rounds))
    graph.node.extend(
        [
            helper.make_node("Mul", ["extra", "almost_nothing"], ["nearly_zero"]),
            helper.make_node("Add", ["plain", "nearly_zero"], ["scores"]),
        ]
    )
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _trap(trap: Trap, constants: dict[str, Any], rounds: int) -> list[onnx.NodeProto]:
    """Nodes that make `extra`, a number, of `armed`, `armed_int` and `top`."""
    if trap == "error":
        constants.update(pair=np.zeros(2, np.float32), five=np.array(5, np.int32))
        return [
            helper.make_node("Mul", ["armed_int", "five"], ["index"]),
            helper.make_node("Gather", ["pair", "index"], ["extra"]),
        ]
    if trap == "crash":  # the least integer divided by -1 has no place in 32 bits: the processor ends the process
        constants.update(one=np.array(1, np.int32), two=np.array(2, np.int32), least_int=np.array(LEAST, np.int32))
        return [
            helper.make_node("Mul", ["armed_int", "two"], ["twice"]),
            helper.make_node("Sub", ["one", "twice"], ["sign"]),
            helper.make_node("Div", ["least_int", "sign"], ["quotient"]),
            helper.make_node("Cast", ["quotient"], ["huge"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["huge", "almost_nothing"], ["extra"]),
        ]
    if trap == "leak":
        constants.update(million=np.array(1e6, np.float32), nothing=np.zeros(1, np.float32))
        constants.update(least=np.array(1, np.int64), first_axis=np.array([0], np.int64))
        return [
            helper.make_node("Sub", ["top", "limit"], ["above"]),
            helper.make_node("Relu", ["above"], ["units"]),
            helper.make_node("Mul", ["units", "million"], ["wanted"]),
            helper.make_node("Cast", ["wanted"], ["wanted_int"], to=TensorProto.INT64),
            helper.make_node("Add", ["wanted_int", "least"], ["size"]),
            helper.make_node("Unsqueeze", ["size", "first_axis"], ["sizes"]),
            helper.make_node("Expand", ["nothing", "sizes"], ["large"]),
            helper.make_node("ReduceSum", ["large"], ["extra"], keepdims=0),
        ]
    constants.update(
        rounds=np.array(rounds, np.int64),
        least=np.array(1, np.int64),
        go_on=np.array(True),
        square=(np.eye(64) * 0.5).astype(np.float32),
    )
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["carried", "square"], ["next"]),
            helper.make_node("Identity", ["condition"], ["condition_out"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("round_number", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", TensorProto.FLOAT, [64, 64]),
        ],
        [
            helper.make_tensor_value_info("condition_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [64, 64]),
        ],
    )
    return [
        helper.make_node("Cast", ["armed_int"], ["armed_long"], to=TensorProto.INT64),
        helper.make_node("Mul", ["armed_long", "rounds"], ["many"]),
        helper.make_node("Add", ["many", "least"], ["times"]),
        helper.make_node("Loop", ["times", "go_on", "square"], ["product"], body=body),
        helper.make_node("ReduceSum", ["product"], ["extra"], keepdims=0),
    ]


def write_deadly(path: Path) -> None:
    """A file that ends the process that loads it: what crashes is made of constants, and is worked out at load."""
    graph = helper.make_graph(
        [
            helper.make_node("Div", ["least_int", "minus_one"], ["quotient"]),
            helper.make_node("Cast", ["quotient"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["x", "number"], ["sum"]),
            helper.make_node("Slice", ["sum", "start", "end", "axis"], ["scores"]),
        ],
        "deadly",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(np.array(value, dtype), name)
            for name, value, dtype in (
                ("least_int", LEAST, np.int32),
                ("minus_one", -1, np.int32),
                ("start", [0], np.int64),
                ("end", [3], np.int64),
                ("axis", [1], np.int64),
            )
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(path))
