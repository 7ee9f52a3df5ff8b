"""From outputs of boxes to the objects that were found in an image: decoding, non-maximum suppression. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.processing.classify import activated
from agent.processing.image import Geometry
from agent.processing.resize import Floats
from agent.protocol.processing import Activation, BoxFormat, Columns, Coordinates, Detection

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
CANDIDATES = 4096  # boxes that suppress each other: the best


class AnswerError(Exception):
    """A model answered what its declaration does not describe; the message says how."""


@dataclass(frozen=True)
class Found:
    """Objects, the best first.

    Attributes:
        boxes: (n, 4) float32: left, top, right, bottom in pixels of the image.
        scores: (n,) float32.
        classes: (n,) int64.
    """

    boxes: Array
    scores: Array
    classes: Array


def detect(outputs: Mapping[str, Array], answer: Detection, size: tuple[int, int], geometry: Geometry) -> Found:
    """What was found in one image.

    Boxes without a finite number, or of no area in the image, are left out.

    Args:
        outputs: of one row, by name.
        answer: the declaration.
        size: height and width of the model's input.
        geometry: where the image lies in it.

    Raises:
        AnswerError: when the outputs are not as the declaration says.
    """
    batched = outputs[answer.boxes.output].ndim == 3
    parts = {field: _table(outputs[part.output], part, batched=batched) for field, part in answer.parts.items()}
    lengths = {field: len(table) for field, table in parts.items()}
    if len(set(lengths.values())) != 1 or parts["boxes"].shape[1] != 4 or not parts["scores"].shape[1]:
        raise AnswerError(f"it gave {lengths} boxes with {parts['boxes'].shape[1]} numbers each, and they need four")
    scores, classes = _scored(parts, answer)
    corners = _corners(parts["boxes"].astype(np.float64), answer, size)
    boxes = geometry.back(corners)
    inside = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    # Not <: what is no number is no object.
    (places,) = np.nonzero(inside & np.isfinite(corners).all(axis=1) & (scores >= answer.threshold))
    places = places[np.argsort(-scores[places], kind="stable")][:CANDIDATES]
    if answer.overlap is not None:
        groups = np.zeros_like(classes) if answer.across_classes else classes
        places = places[suppress(corners[places], groups[places], answer.overlap, answer.max_boxes)]
    places = places[: answer.max_boxes]
    return Found(boxes[places].astype(np.float32), scores[places], classes[places])


def _table(output: Array, part: Columns, *, batched: bool) -> Array:
    """(boxes, columns) of an output."""
    table = output[0] if batched and output.ndim and len(output) else output
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2:
        raise AnswerError(f"its output {part.output!r} has the shape {list(output.shape)}: no table of boxes")
    table = table.T if part.transposed else table
    first, end = part.columns or (0, table.shape[1])
    if end > table.shape[1]:
        raise AnswerError(f"its output {part.output!r} has {table.shape[1]} columns, and {end} are declared")
    return table[:, first:end]


def _scored(parts: dict[str, Array], answer: Detection) -> tuple[Array, Ints]:
    """The score and the class of each box."""
    scores = activated(parts["scores"], answer.activation)
    if "objectness" in parts:
        single = Activation.SIGMOID if answer.activation is Activation.SIGMOID else Activation.NONE
        scores = scores * activated(parts["objectness"], single)[:, :1]
    if "classes" in parts:
        given = parts["classes"][:, 0].astype(np.float64)
        classes = np.where(np.isfinite(given), np.clip(given, -1, 1 << 31), -1).astype(np.int64)
        best = np.where(classes >= 0, scores[:, 0], -np.inf)
        if answer.background is not None:
            best = np.where(classes == answer.background, -np.inf, best)
        return best.astype(np.float32), classes
    if answer.background is not None and answer.background < scores.shape[1]:
        scores[:, answer.background] = -np.inf
    classes = scores.argmax(axis=1).astype(np.int64)
    return scores[np.arange(len(scores)), classes], classes


def _corners(boxes: Floats, answer: Detection, size: tuple[int, int]) -> Floats:
    """Boxes as left, top, right, bottom in pixels of the model's input."""
    first, second, third, fourth = boxes.T
    match answer.format:
        case BoxFormat.XYXY:
            corners = (first, second, third, fourth)
        case BoxFormat.YXYX:
            corners = (second, first, fourth, third)
        case BoxFormat.XYWH:
            corners = (first, second, first + third, second + fourth)
        case BoxFormat.CXCYWH:
            corners = (first - third / 2, second - fourth / 2, first + third / 2, second + fourth / 2)
    found = np.stack(corners, axis=1)
    return found * np.tile((float(size[1]), float(size[0])), 2) if answer.coordinates is Coordinates.RELATIVE else found


def suppress(corners: Floats, groups: Ints, overlap: float, most: int) -> Ints:
    """Places of the boxes that stay, of those that come the best first (non-maximum suppression).

    Args:
        corners: (n, 4): left, top, right, bottom.
        groups: (n,): only boxes of one group suppress each other.
        overlap: least intersection over union at which the later one goes.
        most: boxes after which no more are looked for.
    """
    areas = np.maximum(corners[:, 2] - corners[:, 0], 0) * np.maximum(corners[:, 3] - corners[:, 1], 0)
    left = np.arange(len(corners))
    kept: list[int] = []
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        while len(left) and len(kept) < most:
            best, left = left[0], left[1:]
            kept.append(int(best))
            low = np.maximum(corners[left, :2], corners[best, :2])
            high = np.minimum(corners[left, 2:], corners[best, 2:])
            shared = np.maximum(high - low, 0).prod(axis=1)
            union = areas[left] + areas[best] - shared
            same = (groups[left] == groups[best]) & (union > 0) & (shared >= overlap * union)
            left = left[~same]
    return np.array(kept, np.int64)
