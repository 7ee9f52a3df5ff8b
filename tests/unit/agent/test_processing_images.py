"""From an image to a model's input: resizing as Pillow does it, letterboxes by hand, normalization, the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agent.processing.image import Geometry, ImageError, fit, to_row
from agent.processing.resize import resize
from agent.protocol.processing import Align, Colors, ImageStep, Interpolation, Layout, Resize

SIDES = st.integers(1, 70)
PILLOW = {
    Interpolation.NEAREST: Image.Resampling.NEAREST,
    Interpolation.BILINEAR: Image.Resampling.BILINEAR,
    Interpolation.BICUBIC: Image.Resampling.BICUBIC,
}


def noise(height: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(Interpolation), st.integers(0, 99))
def test_resizing_is_pillows_to_the_last_bit(
    height: int, width: int, rows: int, columns: int, how: Interpolation, seed: int
) -> None:
    image = noise(height, width, seed)
    # One pass at a time: which one Pillow begins with hangs on its version.
    across = Image.fromarray(image).resize((columns, height), PILLOW[how])
    want = np.asarray(across.resize((columns, rows), PILLOW[how]))
    assert np.array_equal(resize(image, (rows, columns), how), want)


@pytest.mark.parametrize("how", Interpolation)
def test_a_window_is_a_part_of_the_whole(how: Interpolation) -> None:
    image = noise(37, 53)
    whole = resize(image, (80, 19), how)
    assert np.array_equal(resize(image, (80, 19), how, window=(11, 3, 40, 9)), whole[11:51, 3:12])


def test_without_antialiasing_only_the_nearest_pixels_count() -> None:
    row = np.array([0, 10, 20, 30, 40, 50, 60, 70], np.uint8).reshape(1, 8, 1)
    # Middles of the new pixels lie at 1.5, 5.5 of the old: between 10 and 20, and between 50 and 60 (half up).
    plain = resize(row, (1, 2), Interpolation.BILINEAR, antialias=False)
    assert plain.ravel().tolist() == [15, 55]
    # With it each is under a triangle of four pixels to each side: 66.25 / 3.5 is the first.
    assert resize(row, (1, 2), Interpolation.BILINEAR).ravel().tolist() == [19, 51]


def test_a_letterbox_by_hand() -> None:
    image = np.full((2, 4, 3), 200, np.uint8)
    step = ImageStep(size=(8, 8), resize=Resize.LETTERBOX, fill=(1, 2, 3))
    fitted, geometry = fit(image, step)
    assert (fitted[2:6] == 200).all()
    assert (fitted[:2] == (1, 2, 3)).all()
    assert (fitted[6:] == (1, 2, 3)).all()
    assert geometry == Geometry(4, 2, (2.0, 2.0), (0.0, 2.0))
    assert geometry.back(np.array([[0.0, 0, 8, 8], [2, 4, 4, 6]])).tolist() == [[0, 0, 4, 2], [1, 1, 2, 2]]
    _, corner = fit(image, ImageStep(size=(8, 8), resize=Resize.LETTERBOX, align=Align.TOP_LEFT))
    assert corner.offset == (0.0, 0.0)


def test_a_center_crop_takes_the_middle() -> None:
    image = noise(40, 80)
    step = ImageStep(size=(20, 20), resize=Resize.CENTER_CROP, shorter_side=24)
    fitted, geometry = fit(image, step)
    whole = resize(image, (24, 48), Interpolation.BILINEAR)
    assert np.array_equal(fitted, whole[2:22, 14:34])
    assert geometry.offset == (-14.0, -2.0)
    assert geometry.back(np.array([[0.0, 0, 20, 20]]))[0] == pytest.approx([14 / 0.6, 2 / 0.6, 34 / 0.6, 22 / 0.6])


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(Resize), st.sampled_from(Align))
def test_what_is_in_the_input_goes_back_to_where_it_was(
    height: int, width: int, rows: int, columns: int, how: Resize, align: Align
) -> None:
    step = ImageStep(size=(rows, columns), resize=how, align=align, interpolation=Interpolation.NEAREST)
    fitted, geometry = fit(noise(height, width), step)
    assert fitted.shape == (rows, columns, 3)
    places = np.array([[0.0, 0.0, width, height], [width / 4, height / 4, width / 2, height / 2]])
    there = places * np.tile(geometry.scale, 2) + np.tile(geometry.offset, 2)
    assert geometry.back(there) == pytest.approx(places, abs=1e-6)
    anywhere = geometry.back(np.array([[-1e9, -1e9, 1e9, 1e9], [5.0, 5.0, 6.0, 6.0]]))
    assert (anywhere >= 0).all()
    assert (anywhere[:, [0, 2]] <= width).all()
    assert (anywhere[:, [1, 3]] <= height).all()
    if how is Resize.LETTERBOX:
        assert (there[0] >= 0).all()
        assert there[0, 2] <= columns + 1e-6
        assert there[0, 3] <= rows + 1e-6


def test_normalization_by_hand() -> None:
    image = np.array([[[0, 127, 255]]], np.uint8)
    row, _ = to_row(image, ImageStep(size=(1, 1), mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0)), "float32")
    assert row.shape == (1, 3, 1, 1)
    assert row.dtype == np.float32
    assert row.ravel() == pytest.approx([-1.0, (127 / 255 - 0.25) / 0.5, 0.5])
    blue, _ = to_row(image, ImageStep(size=(1, 1), colors=Colors.BGR, layout=Layout.NHWC, scale=1.0), "uint8")
    assert blue.shape == (1, 1, 1, 3)
    assert blue.ravel().tolist() == [255, 127, 0]
    signed, _ = to_row(image, ImageStep(size=(1, 1), scale=1.0, mean=(128.0,)), "int8")
    assert signed.ravel().tolist() == [-128, -1, 127]
    half, _ = to_row(image, ImageStep(size=(1, 1)), "float16")
    assert half.dtype == np.float16


def test_grey_is_pillows() -> None:
    image = noise(9, 7)
    row, _ = to_row(image, ImageStep(size=(9, 7), colors=Colors.GREY, scale=1.0), "uint8")
    assert np.array_equal(row[0, 0], np.asarray(Image.fromarray(image).convert("L")))


@pytest.mark.parametrize("how", Resize)
@pytest.mark.parametrize("shape", [(1, 16_384, 3), (16_384, 1, 3)])
def test_a_thread_of_an_image_takes_no_more_memory_than_its_result(how: Resize, shape: Any) -> None:
    fitted, _ = fit(np.zeros(shape, np.uint8), ImageStep(size=(224, 224), resize=how))
    assert fitted.shape == (224, 224, 3)


@pytest.mark.parametrize("shape", [(1, 16_385), (0, 5), (6000, 6000)])
def test_sizes_are_bounded(shape: Any) -> None:
    with pytest.raises(ImageError, match="smaller"):
        fit(np.broadcast_to(np.zeros(3, np.uint8), (*shape, 3)), ImageStep(size=(8, 8)))
