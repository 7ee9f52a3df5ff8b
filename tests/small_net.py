"""A small convolutional net as code, its rows, and weights that are trained on them in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

NET = """
from torch import nn

def build(width=48):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )

def student():
    return build(8)
"""
_TRAINING = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
import net
from converters.training.data import read_training
from converters.training.fit import Fitting, fit
torch.manual_seed(0)
made = net.build()
fit(made, read_training(Path(sys.argv[2])), Fitting(epochs=3, rate=3e-3))
save_file(made.state_dict(), sys.argv[3])
"""


def write_rows(path: Path, rows: int, seed: int, *, labels: bool = True, name: str = "x") -> None:
    """Pictures of noise, of which one of three channels is brighter."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 3, 12, 12)).astype(np.float32)
    y = rng.integers(0, 3, rows)
    x[np.arange(rows), y] += 0.7
    np.savez(path, **{name: x}, **({"y": y.astype(np.int64)} if labels else {}))


def train(code: Path, rows: Path, weights: Path) -> None:
    """Write the weights of the net in a folder's `net.py` after a short training."""
    subprocess.run([sys.executable, "-c", _TRAINING, str(code), str(rows), str(weights)], check=True)


def register(site: Path, code: str, entry_points: str) -> None:
    """Lay out a package that registers architectures: `net.py`, and the entry points of its group."""
    metadata = site / "fleet_nets-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "net.py").write_text(code)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fleet-nets\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[shoal.architectures]\n{entry_points}")
