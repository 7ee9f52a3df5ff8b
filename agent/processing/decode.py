"""Decodes images with Pillow, which is an extra: `images`. What comes is hostile until it is decoded."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np

from agent.processing.image import ImageError, check_size
from agent.processing.resize import Pixels

FORMATS = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP", "image/bmp": "BMP"}  # by media type
REMEDY = "pip install 'shoal[images]'"
_DAMAGED = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
_STRANGE = (SyntaxError, ArithmeticError, RuntimeError, MemoryError, NotImplementedError, struct.error, zlib.error)
_ORIENTATION = 0x0112  # a tag of EXIF
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # grey of 16 bits


class NoDecoderError(Exception):
    """Pillow is not installed; the message names the remedy."""


def decode(data: bytes, formats: tuple[str, ...] = tuple(FORMATS.values())) -> Pixels:
    """An image's pixels, upright as its EXIF orientation says.

    Transparency is left out, 16 bits are cut to 8, CMYK and palettes become red, green and blue; colour profiles are
    not applied. Of a photo with more pictures in its file (MPO) the first is taken.

    Args:
        data: the file's bytes.
        formats: Pillow's names of those that are taken.

    Returns:
        (height, width, 3): red, green and blue.

    Raises:
        ImageError: when it is damaged, of another format, animated or too large.
        NoDecoderError: when Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise NoDecoderError(f"images are decoded by Pillow, which is not installed here: {REMEDY}") from None
    # Its own bound is a warning at first; the size is checked below, before anything is decoded.
    Image.MAX_IMAGE_PIXELS = None
    # It warns of damaged EXIF data, and every such text would be kept: whoever posts images could fill the memory.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    names = " or ".join(formats)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            check_size(image.height, image.width)
            if image.format in {"PNG", "WEBP"} and getattr(image, "is_animated", False):
                raise ImageError("it is animated: send one picture of it")
            image.load()
            turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
            return _pixels(image if turn is None else image.transpose(Image.Transpose[turn]))
    except UnidentifiedImageError:
        raise ImageError(f"it is no {names} that can be read") from None
    except (*_DAMAGED, *_STRANGE) as error:
        # Decoders of damaged files raise nearly anything.
        said = str(error)[:200] or type(error).__name__
        raise ImageError(f"it is damaged, or no {names}: {said}") from None


def _pixels(image: Any) -> Pixels:
    if image.mode in _DEEP:
        deep = np.asarray(image)
        grey = (np.clip(deep, 0, 65_535).astype(np.uint16) >> 8).astype(np.uint8)
        return np.ascontiguousarray(np.broadcast_to(grey[..., None], (*grey.shape, 3)))
    pixels: Pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"), np.uint8)
    return pixels
