"""Thresholds by entropy are those of ONNX Runtime's own search."""

from __future__ import annotations

import numpy as np
import pytest
from onnxruntime.quantization.calibrate import HistogramCollector

from converters.steps.onnx_entropy import entropy_threshold

LEVELS = 128
SHAPES = {
    "normal": lambda rng: rng.standard_normal(5000),
    "rectified": lambda rng: np.maximum(rng.standard_normal(5000), 0),
    "few far away": lambda rng: np.append(rng.standard_normal(5000), [40.0, -70.0, 41.0]),
    "heavy tails": lambda rng: rng.standard_t(1.5, 5000),
    "two values": lambda rng: rng.choice([0.25, 3.0], 500),
    "nothing but zero": lambda rng: np.zeros(50),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bins", [128, 256])
def test_it_cuts_where_the_library_does(shape: str, bins: int) -> None:
    values = SHAPES[shape](np.random.default_rng(bins)).astype(np.float32)
    most = np.abs(values).max()
    counts, edges = np.histogram(values, bins=bins, range=(-most, most))
    histogram = (counts, edges.astype(np.float32), values.min(), values.max(), most)
    theirs = HistogramCollector("entropy", False, bins, LEVELS, 99.9, "same").get_entropy_threshold(histogram, LEVELS)
    assert entropy_threshold(histogram, LEVELS) == theirs


def test_what_is_rare_and_far_away_is_cut_off() -> None:
    values = np.append(np.random.default_rng(0).standard_normal(20_000), [90.0]).astype(np.float32)
    counts, edges = np.histogram(values, bins=512, range=(-90, 90))
    low, high = entropy_threshold((counts, edges.astype(np.float32), values.min(), values.max()), LEVELS)
    assert low == values.min()
    assert high < 45
