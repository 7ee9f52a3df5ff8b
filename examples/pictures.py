"""What examples share: digits of MNIST on real photographs, figures of a classifier, and its response time."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch import nn

from tests.benchmarks.photos import load_pictures

CACHE = Path(__file__).parents[1] / ".demo" / "data"
Rows = tuple[torch.Tensor, torch.Tensor]
CLASSES = 10


def tensors(training: int, testing: int) -> tuple[Rows, Rows, Rows]:
    """Rows to train on, a tenth of them held out, and rows to test on: (rows, 3, 32, 32) float32 and their digits.

    Behind digits to test on are photographs that are behind no other.
    """
    made, test = load_pictures(CACHE, training=training, evaluation=testing)
    x, y, held_out = torch.from_numpy(made.x), torch.from_numpy(made.y), training // 10
    rest = (torch.from_numpy(test.x), torch.from_numpy(test.y))
    return (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out]), rest


def scores(found: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Accuracy, and recall and F1 as means over classes."""
    recalls, f1s = [], []
    for one in range(CLASSES):
        right = float(((found == one) & (truth == one)).sum())
        recalls.append(right / max(1.0, float((truth == one).sum())))
        f1s.append(2 * right / max(1.0, float((found == one).sum() + (truth == one).sum())))
    accuracy = float((found == truth).double().mean())
    named = {"accuracy": accuracy, "recall": statistics.mean(recalls), "f1": statistics.mean(f1s)}
    return {name: round(value, 4) for name, value in named.items()}


def response_ms(net: nn.Module, images: torch.Tensor, count: int = 500) -> float:
    """Median time of one image at a time, in ms, on one thread: as a device's gate measures a variant."""
    seconds = []
    with torch.inference_mode():
        for image in images[:count]:
            started = time.perf_counter()
            net(image[None])
            seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)
