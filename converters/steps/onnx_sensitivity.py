"""Which layers of an ONNX net hurt when they are quantized: what mixed recipes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionError
from converters.step import Context

SENSITIVITY_ROWS = 64
GROUPS = 24
LEFT = (1, 2, 3, 5, 8, 12)


def name_nodes(source: Path, target: Path) -> None:
    """Give every node a name: layers are left out of quantization by it."""
    import onnx

    model = onnx.load(str(source))
    for number, node in enumerate(model.graph.node):
        if not node.name:
            node.name = f"{node.op_type}_{number}"
    onnx.save(model, str(target))


def groups_of(source: Path, operators: tuple[str, ...]) -> list[list[str]]:
    """Names of nodes of some operators in order, in at most `GROUPS` rows of neighbours.

    Raises:
        ConversionError: when there is none.
    """
    import onnx

    names = [node.name for node in onnx.load(str(source)).graph.node if node.op_type in operators and node.name]
    if not names:
        raise ConversionError("nothing_to_do", "the net has no layer that this recipe would quantize")
    size = -(-len(names) // GROUPS)
    return [names[start : start + size] for start in range(0, len(names), size)]


def relative_error(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """Mean squared difference, as a share of the expected's variance."""
    wide = expected.astype(np.float64)
    return float(((wide - got.astype(np.float64)) ** 2).mean() / max(wide.var(), 1e-12))


def answers_of(path: Path, context: Context, most: int) -> np.ndarray[Any, Any]:
    """The first output on the calibration rows."""
    import onnxruntime

    assert context.calibration is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rows = context.calibration.part(0, most).batches(1)
    return np.concatenate([np.atleast_1d(session.run(None, row)[0]) for row in rows])


def agreement_of(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """Share of rows with the same answer."""
    from agent.trial.scoring import answers

    return float((answers(expected) == answers(got)).mean())
