"""ONNX in half precision, by onnxconverter-common."""

from __future__ import annotations

from pathlib import Path

from converters.step import Context, Parameter


def to_fp16(
    source: Path, target: Path, _context: Context, parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Weights and arithmetic in half precision; inputs and outputs keep their dtype when `keep_io_types` is set."""
    import onnx
    from onnxconverter_common import float16

    model = onnx.load(str(source))
    half = float16.convert_float_to_float16(model, keep_io_types=bool(parameters["keep_io_types"]))
    onnx.save(half, str(target))
