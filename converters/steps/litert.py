"""LiteRT files from the TFLite source form: as it came, or in 8-bit integers by AI Edge Quantizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from converters.dataset import Dataset
from converters.errors import ConversionError
from converters.step import Parameter

ROWS = 256


def keep_fp32(source: Path, target: Path, _calibration: Dataset | None, _parameters: dict[str, Parameter]) -> None:
    """The source form itself."""
    shutil.copyfile(source, target)


def static_int8(source: Path, target: Path, calibration: Dataset | None, _parameters: dict[str, Parameter]) -> None:
    """Weights and activations, with ranges seen on calibration data."""
    from ai_edge_quantizer import quantizer, recipe

    assert calibration is not None
    worker = quantizer.Quantizer(str(source))
    worker.load_quantization_recipe(recipe.static_wi8_ai8())
    ranges = worker.calibrate(_samples(source, calibration), num_threads=1)
    worker.quantize(ranges).export_model(str(target), overwrite=True)


def dynamic_int8(source: Path, target: Path, _calibration: Dataset | None, _parameters: dict[str, Parameter]) -> None:
    """Weights only; activations are quantized as they come."""
    from ai_edge_quantizer import quantizer, recipe

    worker = quantizer.Quantizer(str(source))
    worker.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    worker.quantize().export_model(str(target), overwrite=True)


def _samples(source: Path, calibration: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Calibration rows under the names of the file's signature, whose inputs pair with the source's by tensor."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(source), num_threads=1)
    signatures = interpreter.get_signature_list()
    if not signatures:
        raise ConversionError(
            "no_signature", "the TFLite form has no signature: export it with litert-torch", "sources"
        )
    key = next(iter(signatures))
    runner = interpreter.get_signature_runner(key)
    by_tensor = {detail["index"]: name for name, detail in runner.get_input_details().items()}
    order = [detail["index"] for detail in interpreter.get_input_details()]
    names = [by_tensor[index] for index in order if index in by_tensor]
    details = {detail["index"]: detail for detail in interpreter.get_input_details()}
    rows = Dataset({name: a[:ROWS] for name, a in calibration.inputs.items()}, None, min(calibration.rows, ROWS))
    return {
        key: [
            {
                name: row.astype(details[index]["dtype"])
                for name, index, row in zip(names, order, batch.values(), strict=True)
            }
            for batch in rows.batches(1)
        ]
    }
