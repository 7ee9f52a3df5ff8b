"""ONNX with 8-bit weights, and activations quantized as they come, by ONNX Runtime's quantizer."""

from __future__ import annotations

from pathlib import Path

from converters.step import Context, Parameter


def dynamic_int8(
    source: Path, target: Path, _context: Context, parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Quantize the weights of the named operators (all that can be, when none are named)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    named = str(parameters["operators"] or "")
    quantize_dynamic(
        str(source),
        str(target),
        op_types_to_quantize=named.split(",") if named else None,
        weight_type=QuantType.QInt8,
        per_channel=bool(parameters["per_channel"]),
    )
