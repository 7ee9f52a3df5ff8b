"""From an image to a row of a model's input, and from places in that input back to the image. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.processing.resize import Floats, Pixels, resize
from agent.protocol.processing import Align, Colors, ImageStep, Layout, Resize

Array = npt.NDArray[Any]
SIDE_LIMIT = 16_384  # pixels of a side of an image
PIXELS_LIMIT = 1 << 25
_GREY = np.array((19595, 38470, 7471), np.uint32)  # ITU-R 601, in 65,536ths
_CHANNELS = {Colors.RGB: (0, 1, 2), Colors.BGR: (2, 1, 0)}


class ImageError(Exception):
    """An image can't be taken; the message says why and what would help."""


@dataclass(frozen=True)
class Geometry:
    """Where an image lies in a model's input: a place `(x, y)` of it is at `(x, y) × scale + offset` there.

    Attributes:
        width: of the image, in pixels.
        height: likewise.
        scale: of x and y.
        offset: of x and y, in pixels of the input.
    """

    width: int
    height: int
    scale: tuple[float, float]
    offset: tuple[float, float]

    def back(self, boxes: Floats) -> Floats:
        """Boxes (n, 4) of the input, as left, top, right, bottom, in the image and cut off at its edges."""
        scale, offset = np.tile(self.scale, 2), np.tile(self.offset, 2)
        edges = np.tile((float(self.width), float(self.height)), 2)
        found: Floats = np.clip((boxes - offset) / scale, 0.0, edges)
        return found


def fit(image: Pixels, step: ImageStep) -> tuple[Pixels, Geometry]:
    """An image in the size that a model takes.

    Args:
        image: (height, width, 3), red, green and blue.
        step: the declaration.

    Returns:
        (height, width, 3) as `step.size` says, and where the image lies in it.

    Raises:
        ImageError: when it is too large.
    """
    before = image.shape[0], image.shape[1]
    check_size(*before)
    match step.resize:
        case Resize.STRETCH:
            whole, (top, left) = step.size, (0, 0)
        case Resize.LETTERBOX:
            whole, (top, left) = _letterboxed(before, step)
        case Resize.CENTER_CROP:
            whole, (top, left) = _cropped(before, step)
    geometry = Geometry(before[1], before[0], (whole[1] / before[1], whole[0] / before[0]), (float(left), float(top)))
    if step.resize is not Resize.LETTERBOX:
        return resize(
            image, whole, step.interpolation, window=(-top, -left, *step.size), antialias=step.antialias
        ), geometry
    fitted = np.empty((*step.size, 3), np.uint8)
    fitted[:] = step.fill
    fitted[top : top + whole[0], left : left + whole[1]] = resize(
        image, whole, step.interpolation, antialias=step.antialias
    )
    return fitted, geometry


def check_size(height: int, width: int) -> None:
    """Refuse an image that takes more memory than a device has for it.

    Raises:
        ImageError: saying what is taken.
    """
    if not 0 < height <= SIDE_LIMIT or not 0 < width <= SIDE_LIMIT or height * width > PIXELS_LIMIT:
        raise ImageError(
            f"it has {width}×{height} pixels, and sides of 1 to {SIDE_LIMIT} with {PIXELS_LIMIT} pixels in all are "
            "taken: make it smaller"
        )


def _letterboxed(before: tuple[int, int], step: ImageStep) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size of a letterboxed image, and its top and left."""
    ratio = min(step.size[0] / before[0], step.size[1] / before[1])
    height, width = (min(limit, max(1, round(side * ratio))) for side, limit in zip(before, step.size, strict=True))
    if step.align is Align.TOP_LEFT:
        return (height, width), (0, 0)
    return (height, width), ((step.size[0] - height) // 2, (step.size[1] - width) // 2)


def _cropped(before: tuple[int, int], step: ImageStep) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size an image gets before its middle is taken, and where its top and left are then: at 0 or before."""
    shorter = step.shorter_side or max(step.size)
    # The longer side is cut to whole pixels, and the middle rounded to even, as torchvision does.
    height, width = (shorter * side // min(before) for side in before)
    return (height, width), (-round((height - step.size[0]) / 2), -round((width - step.size[1]) / 2))


def to_row(image: Pixels, step: ImageStep, dtype: str) -> tuple[Array, Geometry]:
    """An image as one row of an input.

    Args:
        image: (height, width, 3), red, green and blue.
        step: the declaration.
        dtype: of the input, a numpy name.

    Returns:
        An array of the input's shape with one row, and where the image lies in it.

    Raises:
        ImageError: when the image is too large.
    """
    pixels, geometry = fit(image, step)
    channels: Array
    if step.colors is Colors.GREY:
        channels = (((pixels.astype(np.uint32) * _GREY).sum(axis=2) + 0x8000) >> 16)[..., None]
    else:
        channels = pixels[..., _CHANNELS[step.colors]]
    # Single steps of one precision: every machine gets the same numbers.
    values = channels.astype(np.float32) * np.float32(step.scale)
    values -= np.array(step.mean, np.float32)
    values /= np.array(step.std, np.float32)
    if step.layout is Layout.NCHW:
        values = values.transpose(2, 0, 1)
    wanted = np.dtype(dtype)
    if wanted.kind in "iu":
        bounds = np.iinfo(wanted)
        values = np.clip(np.rint(values.astype(np.float64)), bounds.min, bounds.max)
    return np.ascontiguousarray(values, wanted)[None], geometry
