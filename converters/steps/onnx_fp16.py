"""ONNX in half precision, by ONNX Runtime's own converter: it follows branches, loops and recurrent layers."""

from __future__ import annotations

from pathlib import Path

from converters.errors import ConversionError
from converters.sources import nodes_of
from converters.step import Context, Parameter
from converters.steps.onnx_tidy import has_dtype, is_half, tidied, type_values

# Their scales are in single precision in the opsets that most quantized nets are of.
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def to_fp16(
    source: Path, target: Path, _context: Context, parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Weights and arithmetic in half precision; inputs and outputs keep their dtype when `keep_io_types` is set.

    Raises:
        ConversionError: when the net is in half precision already, or has nothing that could be.
    """
    import onnx
    from onnxruntime.transformers import float16

    model = tidied(source, widen=False)
    if is_half(model):
        raise ConversionError("nothing_to_do", "the net is in half precision already: fp32 is the file as it is")
    blocked = {*float16.DEFAULT_OP_BLOCK_LIST, *QUANTIZED}
    works = any(node.op_type not in blocked | {"Cast"} for node in nodes_of(model.graph.node))
    if not works or not has_dtype(model, onnx.TensorProto.FLOAT):
        raise ConversionError("nothing_to_do", "the net has no layer that could be in half precision")
    half = float16.convert_float_to_float16(
        type_values(model),
        keep_io_types=bool(parameters["keep_io_types"]),
        op_block_list=sorted(blocked),
    )
    onnx.save(half, str(target))
