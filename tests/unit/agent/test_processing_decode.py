"""Images as they are posted: what is decoded, and that hostile ones are refused with a reason."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from agent.processing.decode import NoDecoderError, decode
from agent.processing.image import ImageError
from agent.processing.rows import rows_of
from agent.protocol.processing import ImageStep

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Any, kind: str, **more: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **more)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "more"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_give_their_pixels(kind: str, more: Any) -> None:
    assert np.array_equal(decode(encoded(PIXELS, kind, **more)), PIXELS)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_turned_upright(orientation: Any, kind: str) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(PIXELS, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        assert np.array_equal(decode(data), np.asarray(upright))
    assert decode(data).shape == ((9, 6, 3) if orientation in {5, 6, 7, 8} else (6, 9, 3))


def test_damaged_exif_data_says_nothing_of_the_pixels(recwarn: pytest.WarningsRecorder) -> None:
    exif = Image.Exif()
    exif[274] = 6
    exif[0x010E] = "a description that is longer than four bytes"
    whole = exif.tobytes()
    data = encoded(PIXELS, "JPEG", exif=whole[: len(whole) // 2])
    assert decode(data).shape[2] == 3
    assert len(recwarn) == 0


def grey16() -> Any:
    return Image.fromarray(np.array([[0, 256, 65_535]], np.uint16))


def palette() -> Any:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (encoded(grey16(), "PNG"), [[0, 0, 0], [1, 1, 1], [255, 255, 255]]),
        (encoded(palette(), "PNG", transparency=0), [[255, 0, 0], [0, 0, 255]]),
        (encoded(Image.new("RGBA", (1, 1), (9, 8, 7, 0)), "PNG"), [[9, 8, 7]]),
        (encoded(Image.new("LA", (1, 1), (9, 0)), "PNG"), [[9, 9, 9]]),
        (encoded(Image.new("1", (1, 1), 1), "PNG"), [[255, 255, 255]]),
        (encoded(Image.new("L", (1, 1), 7), "BMP"), [[7, 7, 7]]),
    ],
    ids=["16 bits", "palette", "transparent", "grey and alpha", "1 bit", "grey"],
)
def test_other_modes_become_red_green_and_blue(data: bytes, want: Any) -> None:
    assert decode(data)[0].tolist() == want


def test_cmyk_becomes_red_green_and_blue() -> None:
    got = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert got.shape == (8, 8, 3)
    assert abs(got.astype(int) - [255, 0, 0]).max() < 12


def test_of_a_photo_with_more_pictures_the_first_is_taken() -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (4, 4))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert decode(data, ("JPEG",)).shape == (8, 8, 3)


def png(width: int, height: int, body: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


JPEG = encoded(PIXELS, "JPEG")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "can be read"),
        (b"GIF89a" + bytes(50), "can be read"),
        (encoded(PIXELS, "GIF"), "can be read"),
        (encoded(PIXELS, "TIFF"), "can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "can be read"),
        (JPEG[:300], "damaged"),
        (JPEG[: len(JPEG) // 2], "damaged"),
        (encoded(PIXELS, "PNG")[:-30], "damaged"),
        (encoded(PIXELS, "BMP")[:70], "damaged"),
        (encoded(PIXELS, "WEBP")[:40], "no JPEG"),
        (png(6000, 6000), "6000×6000"),
        (png(2**31 - 1, 2**31 - 1), "smaller"),
        (png(16_385, 1), "smaller"),
        (png(100, 100, bytes(10)), "damaged"),
        (animated("PNG"), "animated"),
        (animated("WEBP"), "animated"),
    ],
    ids=range(16),
)
def test_what_is_hostile_is_refused_with_a_reason(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        decode(data)


def test_another_format_than_was_said_is_refused() -> None:
    with pytest.raises(ImageError, match="no PNG"):
        decode(JPEG, ("PNG",))


def test_every_cut_and_many_flips_of_a_file_are_an_image_or_an_image_error() -> None:
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        whole = bytearray(encoded(PIXELS, kind))
        for _ in range(150):
            data = bytearray(whole[: rng.integers(0, len(whole) + 1)])
            for place in rng.integers(0, max(1, len(data)), 3):
                if data:
                    data[place] ^= int(rng.integers(1, 256))
            with contextlib.suppress(ImageError):
                assert decode(bytes(data)).shape[2] == 3


def test_without_pillow_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(NoDecoderError, match=r"shoal\[images\]"):
        decode(JPEG)


def test_images_of_a_data_set_are_rows_in_either_form() -> None:
    files = [encoded(PIXELS, "PNG"), encoded(PIXELS[:3], "PNG")]
    packed = {
        "image_bytes": np.frombuffer(b"".join(files), np.uint8),
        "image_sizes": np.array([len(one) for one in files]),
        "y": np.array([0, 1]),
    }
    step = ImageStep(size=(4, 4))
    rows = rows_of(packed, step, "float32", 1 << 20)
    assert rows is not None
    assert rows.shape == (2, 3, 4, 4)
    plain = rows_of({"image_pixels": PIXELS[None]}, step, "float32", 1 << 20)
    assert plain is not None
    assert np.array_equal(plain[0], rows[0])
    grey = rows_of({"image_pixels": PIXELS[None, ..., :1]}, step, "float32", 1 << 20)
    assert grey is not None
    assert np.array_equal(grey[0, 0], grey[0, 2])
    assert rows_of({"x": PIXELS}, step, "float32", 1 << 20) is None
    with pytest.raises(ImageError, match="give fewer"):
        rows_of(packed, step, "float32", 100)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"image_pixels": PIXELS}, "uint8 of"),
        ({"image_pixels": PIXELS[None].astype(np.float32)}, "float32"),
        ({"image_bytes": np.zeros(4, np.uint8)}, "image_sizes"),
        ({"image_bytes": np.zeros(4, np.uint8), "image_sizes": np.array([3])}, "as many"),
        ({"image_bytes": np.zeros(4, np.uint8), "image_sizes": np.array([5, -1])}, "image_sizes"),
        ({"image_bytes": np.zeros(4, np.uint8), "image_sizes": np.array([4])}, "image 0: "),
    ],
)
def test_arrays_that_hold_no_images_are_told_of(arrays: Any, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        rows_of(arrays, ImageStep(size=(4, 4)), "float32", 1 << 20)
