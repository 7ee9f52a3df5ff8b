"""Digits on photographs, 32×32×3: MNIST's strokes in a random colour over crops of scikit-image's photographs.

The photographs come with scikit-image's wheel and Debian's opencv-doc, which are fetched once, unpacked and checked.
Those behind evaluation digits are behind no training digit.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from deploy.demo.data import load_mnist
from tests.benchmarks.public.fetch import from_debian, from_index

SCIKIT = ("scikit-image==0.26.0", "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af")
OPENCV = ("opencv-doc", "4.6.0+dfsg-12", "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a")
OPENCV_FOLDER = "usr/share/doc/opencv-doc/examples/data"
TRAINING = (
    *("astronaut.png", "brick.png", "coffee.png", "grass.png", "gravel.png", "ihc.png", "motorcycle_left.png"),
    *("aero1.jpg", "aloeL.jpg", "apple.jpg", "baboon.jpg", "basketball1.png", "board.jpg", "box_in_scene.png"),
    *("building.jpg", "butterfly.jpg", "graf1.png", "left.jpg", "licenseplate_motion.jpg", "orange.jpg"),
    *("rubberwhale1.png", "squirrel_cls.jpg", "starry_night.jpg", "stuff.jpg"),
)
EVALUATION = (
    *("camera.png", "chelsea.png", "rocket.jpg", "chicky_512.png", "fruits.jpg", "home.jpg", "leuvenA.jpg"),
    "messi5.jpg",
)
FROM_SCIKIT = frozenset((*TRAINING[:7], *EVALUATION[:3]))
CONTRAST = 0.5  # of a stroke to the mean behind it, in one channel at least
SIDE = 32


@dataclass(frozen=True)
class Pictures:
    """Rows of pictures: (rows, 3, 32, 32) float32 from 0 to 1, and their digits, (rows,) int64."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]


def load_pictures(cache: Path, *, training: int, evaluation: int) -> tuple[Pictures, Pictures]:
    """Pictures to train on and to evaluate on, the same at every call.

    Args:
        cache: folder for what is fetched.
        training: rows, at most 50,000.
        evaluation: rows, at most 10,000.
    """
    digits, photos = load_mnist(cache), _photos(cache)
    rng = np.random.default_rng(0)
    made = _blend(digits["train_x"][:training], [photos[name] for name in TRAINING], rng)
    held = _blend(digits["test_x"][:evaluation], [photos[name] for name in EVALUATION], rng)
    return Pictures(made, digits["train_y"][:training]), Pictures(held, digits["test_y"][:evaluation])


def _blend(digits: npt.NDArray[np.uint8], photos: list[npt.NDArray[np.float32]], rng: np.random.Generator):  # type: ignore[no-untyped-def]
    """A crop of a random photograph, and over it the digit in a colour that differs from the crop's mean."""
    found = np.empty((len(digits), 3, SIDE, SIDE), np.float32)
    for row, digit in enumerate(digits):
        photo = photos[rng.integers(len(photos))]
        top, left = (int(rng.integers(size - SIDE)) for size in photo.shape[:2])
        crop = photo[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1)
        stroke = np.zeros((SIDE, SIDE), np.float32)
        down, right = (int(one) for one in rng.integers(0, SIDE - 28 + 1, 2))
        stroke[down : down + 28, right : right + 28] = digit.astype(np.float32) / 255
        colour = rng.random(3).astype(np.float32)
        mean = crop.mean((1, 2))
        while np.abs(colour - mean).max() < CONTRAST:
            colour = rng.random(3).astype(np.float32)
        found[row] = crop * (1 - stroke) + colour[:, None, None] * stroke
    return found


def _photos(cache: Path) -> dict[str, npt.NDArray[np.float32]]:
    names = (*TRAINING, *EVALUATION)
    folder = cache / "photos"
    if not all((folder / name).exists() for name in names):
        _fetch(folder, names)
    return {name: np.asarray(Image.open(folder / name).convert("RGB"), np.float32) / 255 for name in names}


def _fetch(folder: Path, names: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ours = {name: f"skimage/data/{name}" for name in names if name in FROM_SCIKIT}
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        found = from_index(Path(fresh), *SCIKIT, ours)
        unpacked = from_debian(Path(fresh), *OPENCV) / OPENCV_FOLDER
        for name in names:
            shutil.copyfile(found.get(name, unpacked / name), folder / name)
