"""LiteRT in integers, by AI Edge Quantizer: static (8-bit weights, 8- or 16-bit activations), dynamic, weight-only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.trial.dataset import Dataset
from converters.errors import ConversionError
from converters.step import Context, Parameter

ROWS = 256
# What holds state, or graphs of its own: the calibrator reads every tensor after a run, and theirs hold nothing then.
RECURRENT = ("LSTM", "RNN", "WHILE", "IF")


def static(
    source: Path, target: Path, context: Context, parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Weights and activations, with ranges seen on calibration data.

    Raises:
        ConversionError: `not_quantizable` where the calibrator can't read the net's tensors, as of recurrent nets.
    """
    from ai_edge_quantizer import quantizer, recipe

    assert context.calibration is not None
    worker = quantizer.Quantizer(str(source))
    worker.load_quantization_recipe(getattr(recipe, str(parameters["recipe"]))())
    samples = _samples(source, context.calibration)
    try:
        ranges = worker.calibrate(samples, num_threads=1)
    except ValueError as error:
        recurrent = _recurrent(source)
        if not recurrent:
            raise
        detail = (
            f"AI Edge Quantizer can't calibrate nets with {', '.join(recurrent)}, as LSTM and GRU become "
            f"({str(error)[:120]}): dynamic-int8 and weight-int8 need no calibration"
        )
        raise ConversionError("not_quantizable", detail) from None
    worker.quantize(ranges).export_model(str(target), overwrite=True)


def without_calibration(
    source: Path, target: Path, _context: Context, parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Weights only; activations are quantized as they come, or stay in floating point."""
    from ai_edge_quantizer import quantizer, recipe

    worker = quantizer.Quantizer(str(source))
    worker.load_quantization_recipe(getattr(recipe, str(parameters["recipe"]))())
    worker.quantize().export_model(str(target), overwrite=True)


def _recurrent(source: Path) -> list[str]:
    """Operators of a file that hold state or run graphs of their own."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(source))
    names = {flatbuffer_utils.opcode_to_name(model, index) or "" for index in range(len(model.operatorCodes))}
    return sorted(name for name in names if any(part in name for part in RECURRENT))


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
    details = {detail["index"]: detail for detail in interpreter.get_input_details()}
    if set(by_tensor.values()) == set(calibration.inputs):
        pairs = [(name, index, name) for index, name in by_tensor.items()]
    else:
        order = [index for index in details if index in by_tensor]
        pairs = [(by_tensor[i], i, name) for i, name in zip(order, calibration.inputs, strict=True)]
    return {
        key: [
            {name: batch[ours].astype(details[index]["dtype"]) for name, index, ours in pairs}
            for batch in calibration.part(0, ROWS).batches(1)
        ]
    }
