"""LiteRT in integers, by AI Edge Quantizer: static (8-bit weights, 8- or 16-bit activations), dynamic, weight-only.

It leaves what is in integers as it is, whatever it is asked for. So of a source that is quantized already only that
recipe has a result whose name tells what the file is; to others there is nothing to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agent.trial.dataset import Dataset
from converters.errors import ConversionError
from converters.step import Context, Parameter
from converters.steps.onnx_tidy import NO_LAYER, not_finite

ROWS = 256
# What holds state, or graphs of its own: the calibrator reads every tensor after a run, and theirs hold nothing then.
RECURRENT = ("LSTM", "RNN", "WHILE", "IF")

# Operators whose weights are made integers of.
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "BATCH_MATMUL", "EMBEDDING_LOOKUP")
# dtypes of the activations that a recipe makes.
ACTIVATIONS = {"static_wi8_ai8": frozenset({"INT8", "UINT8"}), "static_wi8_ai16": frozenset({"INT16"})}


def static(
    source: Path, target: Path, context: Context, parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Weights and activations, with ranges seen on calibration data.

    Raises:
        ConversionError: `not_quantizable` where the calibrator can't read the net's tensors, as of recurrent nets;
            `nothing_to_do` where no layer becomes integers, and those that are there are not of the recipe's width;
            `weights_not_finite`.
    """
    from ai_edge_quantizer import quantizer, recipe

    assert context.calibration is not None
    _check_weights(source)
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
    _check_quantized(source, target, ACTIVATIONS[str(parameters["recipe"])])


def without_calibration(
    source: Path, target: Path, _context: Context, parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Weights only; activations are quantized as they come, or stay in floating point.

    Raises:
        ConversionError: `nothing_to_do` where no weight becomes integers; `weights_not_finite`.
    """
    from ai_edge_quantizer import quantizer, recipe

    _check_weights(source)
    worker = quantizer.Quantizer(str(source))
    worker.load_quantization_recipe(getattr(recipe, str(parameters["recipe"]))())
    worker.quantize().export_model(str(target), overwrite=True)
    _check_quantized(source, target, frozenset())


def _check_weights(source: Path) -> None:
    """Refuse NaN and infinity in the weights of layers, of which the quantizer would make scales that mean nothing.

    Raises:
        ConversionError: `weights_not_finite`.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(source))
    for graph in model.subgraphs:
        for operator in graph.operators:
            if flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) not in WEIGHTED:
                continue
            for tensor in (graph.tensors[index] for index in operator.inputs if index >= 0):
                data = model.buffers[tensor.buffer].data
                if tensor.type != schema.TensorType.FLOAT32 or data is None:
                    continue
                if not np.isfinite(np.frombuffer(bytes(data), "<f4")).all():
                    raise not_finite(tensor.name.decode(errors="replace"))


def _check_quantized(source: Path, target: Path, kept: frozenset[str]) -> None:
    """Refuse what the quantizer has left as it was, unless its activations are of dtypes that are `kept`.

    Raises:
        ConversionError: `nothing_to_do`.
    """
    before, activations = _integers(source)
    after, _ = _integers(target)
    if after > before or (activations and activations <= kept):
        return
    detail = "the net is in integers already: fp32 is the file as it is" if before else NO_LAYER
    raise ConversionError("nothing_to_do", detail)


def _integers(path: Path) -> tuple[int, set[str]]:
    """How many tensors of a file are quantized, and the dtypes of those that are no weights."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model(str(path))
    count, dtypes = 0, set()
    for tensor in (tensor for graph in model.subgraphs for tensor in graph.tensors):
        if tensor.quantization is None or tensor.quantization.scale is None or not len(tensor.quantization.scale):
            continue
        count += 1
        data = model.buffers[tensor.buffer].data
        if data is None or not len(data):
            dtypes.add(flatbuffer_utils.type_to_name(tensor.type))
    return count, dtypes


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
