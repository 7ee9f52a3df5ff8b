"""ONNX with 8-bit weights, and activations quantized as they come, by ONNX Runtime's quantizer.

The mixed form leaves those layers in floating point that hurt most, as few as it takes: each is quantized alone, and
the answers on calibration rows are compared with the source's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from converters.errors import ConversionError
from converters.step import Context, Parameter
from converters.steps.onnx_sensitivity import (
    LEFT,
    SENSITIVITY_ROWS,
    answers_of,
    groups_of,
    name_nodes,
    ordered_by_harm,
    relative_error,
)
from converters.steps.onnx_tidy import tidied

MATRICES = ("MatMul", "Gemm")


def dynamic_int8(
    source: Path, target: Path, _context: Context, parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Quantize the weights of the named operators (all that can be, when none are named)."""
    named = str(parameters["operators"] or "")
    _quantize(source, target, parameters, operators=named.split(",") if named else None, exclude=[])


def mixed_dynamic(
    source: Path, target: Path, context: Context, parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Quantize all matrix products but those that hurt: as few as it takes.

    Raises:
        ConversionError: when even with half of them in floating point the answers differ too much.
    """
    allowed = (context.accuracy_drop_points if context.accuracy_drop_points is not None else 1.0) / 100
    with tempfile.TemporaryDirectory(dir=context.folder) as folder:
        named = Path(folder) / "named.onnx"
        name_nodes(source, named)
        groups = groups_of(named, MATRICES)
        expected = answers_of(named, context, SENSITIVITY_ROWS)

        def lost(exclude: list[str]) -> float:
            _quantize(named, target, parameters, operators=list(MATRICES), exclude=exclude)
            return relative_error(expected, answers_of(target, context, SENSITIVITY_ROWS))

        ordered, loss = ordered_by_harm(groups, lost, found), 1.0
        for count in (one for one in LEFT if one <= max(1, (len(groups) + 1) // 2)):
            left = [name for group in ordered[:count] for name in group]
            loss = lost(left)
            if loss <= allowed:
                found.update(layers=sum(map(len, groups)), left_in_float=len(left), share_lost=round(loss, 6))
                return
    detail = f"with half of its matrix products in floating point its answers still differ by {loss:.2%}"
    raise ConversionError("too_sensitive", detail)


def _quantize(
    source: Path, target: Path, parameters: dict[str, Parameter], *, operators: list[str] | None, exclude: list[str]
) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        tidied(source),
        str(target),
        op_types_to_quantize=operators,
        weight_type=QuantType.QInt8,
        per_channel=bool(parameters["per_channel"]),
        nodes_to_exclude=exclude,
    )
