"""ONNX with 8-bit weights, and activations quantized as they come, by ONNX Runtime's quantizer.

The mixed form leaves those layers in floating point that hurt most, as few as it takes: each is quantized alone, and
the answers on calibration rows are compared with the source's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from converters.step import Context, Parameter
from converters.steps.onnx_sensitivity import (
    SENSITIVITY_ROWS,
    answers_of,
    groups_of,
    left_in_float,
    ordered_by_harm,
    relative_error,
)
from converters.steps.onnx_tidy import WEIGHTED, check_quantized, check_weights, tidied

MATRICES = ("MatMul", "Gemm")


def dynamic_int8(
    source: Path, target: Path, _context: Context, parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Quantize the weights of the named operators (all that can be, when none are named).

    Raises:
        ConversionError: when there are none, or when some are NaN or infinite.
    """
    import onnx

    named = str(parameters["operators"] or "")
    operators = named.split(",") if named else None
    model = tidied(source)
    check_weights(model, operators or WEIGHTED)
    _quantize(model, target, parameters, operators=operators, exclude=[])
    check_quantized(model, onnx.load(str(target)))


def mixed_dynamic(
    source: Path, target: Path, context: Context, parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Quantize all matrix products but those that hurt: as few as it takes.

    Raises:
        ConversionError: when even with half of them in floating point the answers differ too much, or when there is no
            other, or when weights are NaN or infinite.
    """
    import onnx

    allowed = (context.accuracy_drop_points if context.accuracy_drop_points is not None else 1.0) / 100
    model = tidied(source)
    check_weights(model, MATRICES)
    groups = groups_of(model, MATRICES)
    expected = answers_of(source, context, SENSITIVITY_ROWS)
    loss = 1.0

    def lost(exclude: list[str]) -> float:
        _quantize(model, target, parameters, operators=list(MATRICES), exclude=exclude)
        return relative_error(expected, answers_of(target, context, SENSITIVITY_ROWS))

    def agrees(left: list[str]) -> bool:
        nonlocal loss
        loss = lost(left)
        return loss <= allowed

    if not left_in_float(ordered_by_harm(groups, lost, found), agrees, found):
        detail = f"with half of its matrix products in floating point its answers still differ by {loss:.2%}"
        raise ConversionError("too_sensitive", detail)
    check_quantized(model, onnx.load(str(target)))
    found["share_lost"] = round(loss, 6)


def _quantize(
    model: Any, target: Path, parameters: dict[str, Parameter], *, operators: list[str] | None, exclude: list[str]
) -> None:
    """Quantize a tidied net, which stays as it is."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        model,
        str(target),
        op_types_to_quantize=operators,
        weight_type=QuantType.QInt8,
        per_channel=bool(parameters["per_channel"]),
        reduce_range=parameters["weight_bits"] == 7,
        nodes_to_exclude=exclude,
    )
