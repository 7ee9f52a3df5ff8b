"""Which recipes are worth trying for a target: pure. A profile names precisions; measurement decides among recipes."""

from __future__ import annotations

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from converters.job import Target
from converters.step import Parameter, Recipe
from converters.steps import litert, onnx_float, onnx_int8

_ONNX_TOOLS = ("onnx", "onnxruntime", "onnxconverter-common", "numpy")
_LITERT_TOOLS = ("ai-edge-litert", "ai-edge-quantizer", "numpy")


def _onnx(name: str, precision: Precision, run: object, parameters: dict[str, Parameter], *, needs: bool) -> Recipe:
    return Recipe(name, RuntimeName.ONNX, precision, ModelFormat.ONNX, needs, parameters, run, _ONNX_TOOLS)  # type: ignore[arg-type]


def _litert(name: str, precision: Precision, run: object, *, needs: bool) -> Recipe:
    return Recipe(name, RuntimeName.LITERT, precision, ModelFormat.TFLITE, needs, {}, run, _LITERT_TOOLS)  # type: ignore[arg-type]


RECIPES: tuple[Recipe, ...] = (
    _onnx("onnx-fp32", Precision.FP32, onnx_float.keep_fp32, {}, needs=False),
    _onnx("onnx-fp16", Precision.FP16, onnx_float.to_fp16, {"keep_io_types": True}, needs=False),
    _onnx("onnx-static-u8s8", Precision.INT8, onnx_int8.static_int8, {"calibration": "MinMax"}, needs=True),
    _onnx(
        "onnx-static-u8s8-percentile", Precision.INT8, onnx_int8.static_int8, {"calibration": "Percentile"}, needs=True
    ),
    _onnx("onnx-dynamic", Precision.DYNAMIC_INT8, onnx_int8.dynamic_int8, {"operators": ""}, needs=False),
    _onnx("onnx-dynamic-matmul", Precision.DYNAMIC_INT8, onnx_int8.dynamic_int8, {"operators": "MatMul"}, needs=False),
    _litert("litert-fp32", Precision.FP32, litert.keep_fp32, needs=False),
    _litert("litert-static-int8", Precision.INT8, litert.static_int8, needs=True),
    _litert("litert-dynamic-int8", Precision.DYNAMIC_INT8, litert.dynamic_int8, needs=False),
)


def plan(target: Target) -> list[Recipe]:
    """The recipes of the target's runtime and precisions, in the order of its precisions."""
    return [
        recipe
        for precision in target.precisions
        for recipe in RECIPES
        if recipe.runtime is target.runtime and recipe.precision is precision
    ]
