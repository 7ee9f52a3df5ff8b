"""From the scores of an output to the best classes. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from agent.protocol.processing import Activation, Classification

Array = npt.NDArray[Any]


def activated(scores: Array, activation: Activation) -> Array:
    """Scores after their activation, in float32; softmax goes over the last axis."""
    wide = scores.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        if activation is Activation.SIGMOID:
            wide = 1.0 / (1.0 + np.exp(-wide))
        elif activation is Activation.SOFTMAX:
            powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
            wide = powers / powers.sum(axis=-1, keepdims=True)
    narrow: Array = wide.astype(np.float32)
    return narrow


def classify(output: Array, answer: Classification) -> tuple[Array, Array]:
    """The best classes of one row.

    The order is that of the output, of equal scores the first class first: the best is the class by which accuracy is
    measured. What is no number (NaN) is left out.

    Args:
        output: of one row.
        answer: the declaration.

    Returns:
        Scores after the activation, float32 (k,), and their classes, int64 (k,).
    """
    raw = output.reshape(-1)
    scores = activated(raw, answer.activation)
    order = np.argsort(-raw.astype(np.float64), kind="stable")[: answer.top_k].astype(np.int64)
    kept = scores[order] >= (-np.inf if answer.threshold is None else answer.threshold)
    return scores[order][kept], order[kept]
