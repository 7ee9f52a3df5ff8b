"""ONNX in floating point: as it came, or in half precision."""

from __future__ import annotations

import shutil
from pathlib import Path

from converters.dataset import Dataset
from converters.step import Parameter


def keep_fp32(source: Path, target: Path, _calibration: Dataset | None, _parameters: dict[str, Parameter]) -> None:
    """The source form itself: what runs on the device is what was pushed."""
    shutil.copyfile(source, target)


def to_fp16(source: Path, target: Path, _calibration: Dataset | None, parameters: dict[str, Parameter]) -> None:
    """Weights and arithmetic in half precision; inputs and outputs keep their dtype when `keep_io_types` is set."""
    import onnx
    from onnxconverter_common import float16

    model = onnx.load(str(source))
    half = float16.convert_float_to_float16(model, keep_io_types=bool(parameters["keep_io_types"]))
    onnx.save(half, str(target))
