"""ONNX with the weights of matrix products in 8 or 4 bits by blocks, and everything else in floating point.

ONNX Runtime's `MatMulNBits` (round to nearest). For nets whose time or size is in their matrix products.
"""

from __future__ import annotations

from pathlib import Path

from converters.errors import ConversionError
from converters.step import Context, Parameter
from converters.steps.onnx_tidy import tidied


def weight_only(
    source: Path, target: Path, _context: Context, parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Quantize constant weights of MatMul.

    Raises:
        ConversionError: when the net has none.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = tidied(source)
    double = {one.name for one in model.graph.initializer if one.data_type == onnx.TensorProto.DOUBLE}
    worker = MatMulNBitsQuantizer(
        model,
        bits=int(parameters["bits"] or 4),
        block_size=int(parameters["block"] or 32),
        is_symmetric=True,
        accuracy_level=4,  # 8-bit arithmetic where the CPU has it
        nodes_to_exclude=[node.name for node in model.graph.node if double.intersection(node.input)],
    )
    worker.process()
    changed = sum(node.op_type == "MatMulNBits" for node in worker.model.model.graph.node)
    if changed == 0:
        detail = "the net has no matrix product with constant weights: weight-only recipes have nothing to do"
        raise ConversionError("nothing_to_do", detail)
    found["changed"] = changed
    onnx.save(worker.model.model, str(target))
