"""Images of a data set as rows of a model's input: what variants are measured on is what devices are posted.

Arrays of an `.npz` hold them in one of two forms: `image_pixels`, uint8 of shape (rows, height, width, 3) or, of grey
ones, (rows, height, width, 1); or `image_bytes`, the bytes of JPEG, PNG, WebP or BMP files one after another, as uint8,
with `image_sizes`, how many each file has, as integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.processing.decode import decode
from agent.processing.image import ImageError, to_row
from agent.processing.resize import Pixels
from agent.protocol.processing import CHANNELS, ImageStep

Array = npt.NDArray[Any]
PIXELS, BYTES, SIZES = "image_pixels", "image_bytes", "image_sizes"
ARRAYS = frozenset({PIXELS, BYTES, SIZES})


def images_of(arrays: Mapping[str, Array]) -> tuple[int, Iterator[Pixels]] | None:
    """How many images arrays of a data set hold, and each; None where they hold none.

    Raises:
        ImageError: when they are of another dtype or shape than they have to be, or, by the iterator, when one can't be
            decoded.
        NoDecoderError: by the iterator, when images are encoded and Pillow is not installed.
    """
    if PIXELS in arrays:
        pixels = arrays[PIXELS]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in {1, 3} or not pixels.size:
            raise ImageError(
                f"{PIXELS} holds {pixels.dtype} of {list(pixels.shape)}, and not uint8 of (rows, height, width, 3)"
            )
        return len(pixels), (np.broadcast_to(one, (*one.shape[:2], 3)) for one in pixels)
    if BYTES not in arrays:
        return None
    data, sizes = arrays[BYTES], arrays.get(SIZES)
    if sizes is None or sizes.dtype.kind not in "iu" or sizes.ndim != 1 or not sizes.size or sizes.min() < 1:
        raise ImageError(f"{BYTES} needs {SIZES}: one whole number for each file, of its bytes")
    if data.dtype != np.uint8 or data.ndim != 1 or len(data) != sum(int(size) for size in sizes):
        raise ImageError(
            f"{BYTES} holds {data.dtype} of shape {list(data.shape)}, and not as many uint8 as {SIZES} say"
        )
    return len(sizes), _decoded(data, sizes)


def _decoded(data: Array, sizes: Array) -> Iterator[Pixels]:
    ends = np.cumsum(sizes.astype(np.int64))
    for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        try:
            yield decode(data[int(end) - int(size) : int(end)].tobytes())
        except ImageError as error:
            raise ImageError(f"image {number}: {error}") from None


def rows_of(arrays: Mapping[str, Array], step: ImageStep, dtype: str, limit: int) -> Array | None:
    """Rows of an input made of the images that arrays of a data set hold; None where they hold none.

    Args:
        arrays: of the data set, by name.
        step: the declaration.
        dtype: of the input, a numpy name.
        limit: of bytes of the result.

    Raises:
        ImageError: when an image can't be taken, or all of them are too much.
        NoDecoderError: when images are encoded and Pillow is not installed.
    """
    found = images_of(arrays)
    if found is None:
        return None
    count, images = found
    size = count * CHANNELS[step.colors.value] * step.size[0] * step.size[1] * np.dtype(dtype).itemsize
    if size > limit:
        raise ImageError(f"as inputs its {count} images have {size} bytes, at most {limit} are taken: give fewer")
    rows: Array | None = None
    for number, image in enumerate(images):
        row, _ = to_row(image, step, dtype)
        if rows is None:
            rows = np.empty((count, *row.shape[1:]), row.dtype)
        rows[number] = row[0]
    return rows
