"""Where to cut a histogram of activations off: where 8 bits lose least, by the Kullback-Leibler divergence.

The method is that of S. Migacz, "8-bit Inference with TensorRT", GTC 2017, as ONNX Runtime's calibrator has it,
with the same thresholds. That one adds bins up in Python, which took most of a build's time; this one uses arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SMOOTHED = 1e-4  # what an empty bin gets of the others, as the library has it


def entropy_threshold(histogram: tuple[Any, ...], levels: int) -> tuple[Any, Any]:
    """The lowest and the highest value that are worth a level.

    Args:
        histogram: counts of bins around zero, their edges, and the least and the largest value that was seen.
        levels: how many groups of bins are told apart.
    """
    counts, edges, least, most = histogram[:4]
    middle = counts.size // 2
    sums = np.concatenate([np.zeros(1, counts.dtype), np.cumsum(counts)])
    best, cut = np.inf, (edges[middle - levels // 2], edges[min(middle + levels // 2 + 1, counts.size)])
    for reach in range(levels // 2, middle + 1):
        start, end = middle - reach, min(middle + reach + 1, counts.size)
        divergence = _divergence(counts[start:end], sums[start], sums[-1] - sums[end], levels)
        if divergence < best:
            best, cut = divergence, (edges[start], edges[end])
    return max(cut[0], least), min(cut[1], most)


def _divergence(inside: npt.NDArray[Any], below: int, above: int, levels: int) -> float:
    """Of what a histogram says from what is left of it when its bins are merged, in nats."""
    said = inside.copy()
    said[0] += below
    said[-1] += above
    width = inside.size // levels
    whole = width * levels
    merged = inside[:whole].reshape(levels, width).sum(1)
    merged[-1] += inside[whole:].sum()
    filled = (said[:whole] != 0).reshape(levels, width).sum(1)
    left = np.zeros_like(said)
    left[:whole] = np.repeat(merged // np.maximum(filled, 1) * (filled > 0), width)
    p, q = _smooth(said), _smooth(left)
    return float(np.sum(p * np.log(p / q))) if p is not None and q is not None else np.inf


def _smooth(counts: npt.NDArray[Any]) -> npt.NDArray[np.float32] | None:
    """Shares of the whole without a zero; None where there is nothing."""
    empty = counts == 0
    zeros = int(empty.sum())
    if zeros == counts.size:
        return None
    shares: npt.NDArray[np.float32] = np.where(
        empty, SMOOTHED, counts - SMOOTHED * zeros / (counts.size - zeros)
    ).astype(np.float32)
    shares /= shares.sum()
    return shares
