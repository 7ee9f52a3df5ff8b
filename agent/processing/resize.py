"""Resizing of 8-bit images in whole numbers: every machine gets the same pixels, and they are Pillow's.

Each output pixel is a weighted sum of those it covers, along rows first, then along columns, with weights of 22 bits
and a result of 8 bits after each pass. The sums are carried out in double precision, in which they are exact. (Pillow
13 begins with the columns where that is less work, which changes a last bit here and there.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from agent.protocol.processing import Interpolation

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
_BITS = 22  # of weights
_BLOCK = 8  # output pixels whose sums are made together
_STRIP = 1 << 21  # numbers of a part that are widened at once


def _triangle(distance: Floats) -> Floats:
    return np.maximum(0.0, 1.0 - np.abs(distance))


def _cubic(distance: Floats) -> Floats:
    """Keys' cubic with a = -0.5."""
    x = np.abs(distance)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_FILTERS: dict[Interpolation, tuple[Callable[[Floats], Floats], float]] = {
    Interpolation.BILINEAR: (_triangle, 1.0),
    Interpolation.BICUBIC: (_cubic, 2.0),
}


def resize(
    image: Pixels,
    size: tuple[int, int],
    interpolation: Interpolation,
    *,
    antialias: bool = True,
    window: tuple[int, int, int, int] | None = None,
) -> Pixels:
    """An image in another size.

    Args:
        image: (height, width, channels).
        size: height and width of the result.
        interpolation: how.
        antialias: whether what an output pixel covers is averaged where it covers more than one.
        window: top, left, height and width of the part of the result that is wanted; None is all of it.

    Returns:
        (height, width, channels) of the window.
    """
    top, left, height, width = window or (0, 0, *size)
    if interpolation is Interpolation.NEAREST:
        rows = _nearest(image.shape[0], size[0])[top : top + height]
        columns = _nearest(image.shape[1], size[1])[left : left + width]
        return image[rows][:, columns]
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))  # (channels, height, width)
    across = _weights(image.shape[1], size[1], left, width, interpolation, antialias=antialias)
    down = _weights(image.shape[0], size[0], top, height, interpolation, antialias=antialias)
    needed = slice(min(first for first, _ in down), max(first + len(one) for first, one in down))
    planes = np.ascontiguousarray(planes[:, needed])
    down = [(first - needed.start, one) for first, one in down]
    if size[1] != image.shape[1] or width != size[1]:
        planes = _columns(planes, across)
    if size[0] != image.shape[0] or height != size[0]:
        planes = _columns(planes.transpose(0, 2, 1), down).transpose(0, 2, 1)
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def _nearest(before: int, after: int) -> npt.NDArray[np.intp]:
    """The pixel that each output pixel's middle lies in."""
    step = before / after
    places = np.full(after, step)
    places[0] = step * 0.5
    return np.minimum(np.cumsum(places).astype(np.intp), before - 1)


def _weights(
    before: int, after: int, first: int, count: int, interpolation: Interpolation, *, antialias: bool
) -> list[tuple[int, Floats]]:
    """For each output pixel from `first` on: the first input pixel that counts, and whole-number weights from there."""
    function, reach = _FILTERS[interpolation]
    step = before / after
    spread = max(1.0, step) if antialias else 1.0
    support = reach * spread
    found = []
    for index in range(first, first + count):
        center = (index + 0.5) * step
        start = max(0, int(center - support + 0.5))
        end = min(before, int(center + support + 0.5))
        shares = function((np.arange(start, end, dtype=np.float64) - center + 0.5) * (1.0 / spread))
        shares = shares / shares.sum()
        whole: Floats = np.trunc(shares * (1 << _BITS) + np.where(shares < 0, -0.5, 0.5))
        found.append((start, whole))
    return found


def _columns(planes: Pixels, weights: list[tuple[int, Floats]]) -> Pixels:
    """Weighted sums along the last axis of (channels, rows, columns)."""
    channels, rows, _ = planes.shape
    made = np.empty((channels, rows, len(weights)), np.uint8)
    for start in range(0, len(weights), _BLOCK):
        block = weights[start : start + _BLOCK]
        begin, end = min(first for first, _ in block), max(first + len(one) for first, one in block)
        table = np.zeros((end - begin, len(block)))
        for place, (first, one) in enumerate(block):
            table[first - begin : first - begin + len(one), place] = one
        strip = max(1, _STRIP // (channels * (end - begin)))
        for row in range(0, rows, strip):
            part = planes[:, row : row + strip, begin:end].astype(np.float64)
            sums = (part @ table + (1 << (_BITS - 1))) / (1 << _BITS)
            made[:, row : row + strip, start : start + len(block)] = np.clip(np.floor(sums), 0, 255)
    return made
