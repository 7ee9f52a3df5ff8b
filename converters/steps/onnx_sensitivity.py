"""Which layers of an ONNX net hurt when they are quantized: what mixed recipes share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionError
from converters.step import Context, Parameter
from converters.steps.onnx_tidy import NO_LAYER

SENSITIVITY_ROWS = 64
GROUPS = 24
LEFT = (1, 2, 3, 5, 8, 12)
LEAST_ROWS = 16
ANSWER_SECONDS = 10.0
TRYING_SECONDS = 90.0


def groups_of(model: Any, operators: tuple[str, ...]) -> list[list[str]]:
    """Names of nodes of some operators in order, in at most `GROUPS` rows of neighbours.

    Raises:
        ConversionError: when there is none.
    """
    names = [node.name for node in model.graph.node if node.op_type in operators and node.name]
    if not names:
        raise ConversionError("nothing_to_do", NO_LAYER)
    size = -(-len(names) // GROUPS)
    return [names[start : start + size] for start in range(0, len(names), size)]


def ordered_by_harm(
    groups: list[list[str]], harm: Callable[[list[str]], float], found: dict[str, Parameter]
) -> list[list[str]]:
    """Groups, the most harmful first: each is quantized alone.

    Of a net that is slow to quantize not all may be tried within `TRYING_SECONDS`; the rest counts as harmless.

    Args:
        groups: of nodes, by name.
        harm: what is lost when the nodes of these names stay in floating point.
        found: gets how many were not tried, if any.
    """
    until = time.monotonic() + TRYING_SECONDS
    harms: list[float] = []
    for group in groups:
        if time.monotonic() > until:
            found["groups_not_tried"] = len(groups) - len(harms)
            break
        harms.append(harm([name for other in groups if other is not group for name in other]))
    harms += [0.0] * (len(groups) - len(harms))
    return [groups[index] for index in np.argsort(harms, kind="stable")[::-1]]


def left_in_float(ordered: list[list[str]], agrees: Callable[[list[str]], bool], found: dict[str, Parameter]) -> bool:
    """Leave ever more of the most harmful groups in floating point, half of them at most, until the answers agree.

    Args:
        ordered: groups of nodes, the most harmful first.
        agrees: whether the answers do when the nodes of these names stay in floating point.
        found: gets how many layers there are, and how many were left, where that was enough.

    Returns:
        Whether it was.
    """
    for count in (one for one in LEFT if one <= max(1, (len(ordered) + 1) // 2)):
        left = [name for group in ordered[:count] for name in group]
        if agrees(left):
            found.update(layers=sum(map(len, ordered)), left_in_float=len(left))
            return True
    return False


def relative_error(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """Mean squared difference, as a share of the expected's variance, over the rows that both have."""
    rows = min(len(expected), len(got))
    wide = expected[:rows].astype(np.float64)
    return float(((wide - got[:rows].astype(np.float64)) ** 2).mean() / max(wide.var(), 1e-12))


def answers_of(path: Path, context: Context, most: int) -> np.ndarray[Any, Any]:
    """The first output on the calibration rows; of a slow net those that fit in `ANSWER_SECONDS`, but 16."""
    import onnxruntime

    assert context.calibration is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    until = time.monotonic() + ANSWER_SECONDS
    answers = []
    for row in context.calibration.part(0, most).batches(1):
        answers.append(np.atleast_1d(session.run(None, row)[0]))
        if len(answers) >= LEAST_ROWS and time.monotonic() > until:
            break
    return np.concatenate(answers)


def agreement_of(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """Share of rows with the same answer, of those that both have."""
    from agent.trial.scoring import answers

    rows = min(len(expected), len(got))
    return float((answers(expected[:rows]) == answers(got[:rows])).mean())
