"""ONNX in 8-bit integers with ranges from calibration data, by ONNX Runtime's quantizer.

uint8 activations and int8 weights per channel in QDQ form: measured to be 5 times as fast as the library's own defaults
on CPUs with VNNI. Those without it add pairs of products in 16 bits and cut off what does not fit, which costs a few
points of accuracy unless weights keep to 7 bits: so both are candidates. Ranges are collected a few rows at a time,
because the library's histograms keep every activation of everything they are given; they are kept for other recipes of
the build.

Mixed precision leaves those layers in floating point that hurt most. How much a layer hurts is measured: it alone is
quantized, and the answers on calibration rows are compared with the source's. As many are left as it takes to agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.trial.dataset import Dataset
from converters.digest import file_digest
from converters.errors import ConversionError
from converters.step import Context, Parameter
from converters.steps.onnx_entropy import entropy_threshold
from converters.steps.onnx_pooling import pool_means
from converters.steps.onnx_sensitivity import (
    SENSITIVITY_ROWS,
    agreement_of,
    answers_of,
    groups_of,
    left_in_float,
    ordered_by_harm,
    relative_error,
)
from converters.steps.onnx_tidy import (
    NO_LAYER,
    PER_CHANNEL_OPSET,
    check_quantized,
    check_weights,
    for_quantizers,
    has_dtype,
    loads,
    name_nodes,
    opset_of,
    tidied,
    type_values,
)

ROWS = 512
SLICE = 16
# Entropy is searched for over so many bins: TensorRT's 2,048 take minutes here, the library's 128 leave no choice.
ENTROPY_BINS = 512
QUANTIZED = ("Conv", "MatMul", "Gemm", "ConvTranspose")


class Reader:
    """Calibration rows one at a time, as ONNX Runtime's calibrator asks for them."""

    def __init__(self, data: Dataset, start: int, stop: int) -> None:
        self._rows = data.part(start, stop).batches(1)

    def get_next(self) -> dict[str, Any] | None:
        """The next row, or None at the end."""
        return next(self._rows, None)


def prepare(
    source: Path, target: Path, _context: Context, _parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Tidy, fold constants, fuse what ONNX Runtime fuses, and infer shapes: quantizers do better work after it.

    Raises:
        ConversionError: when nothing is in single precision, of which alone quantizers make integers, or when weights
            are NaN or infinite.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    tidy = target.with_suffix(".tidy.onnx")
    model = tidied(source)
    if not has_dtype(model, onnx.TensorProto.FLOAT):
        raise ConversionError("nothing_to_do", NO_LAYER)
    check_weights(model)
    onnx.save(for_quantizers(model), str(tidy))
    try:
        quant_pre_process(str(tidy), str(target), skip_symbolic_shape=True)
    except Exception:  # noqa: BLE001 (shape inference fails in many ways; the file as it is may still quantize)
        model = onnx.load(str(tidy))
        name_nodes(model)
    else:
        model = onnx.load(str(target))
        name_nodes(model)
        if pooled := pool_means(model):
            model = onnx.shape_inference.infer_shapes(model)
            found["means_pooled"] = pooled
    onnx.save(type_values(model), str(target))
    tidy.unlink()


def static_int8(
    source: Path, target: Path, context: Context, parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Quantize every layer that can be.

    Raises:
        ConversionError: when there is none.
    """
    import onnx

    if not _quantize(source, target, context, parameters, exclude=[]):
        found["per_channel"] = False
    check_quantized(onnx.load(str(source)), onnx.load(str(target)))


def mixed_int8(
    source: Path, target: Path, context: Context, parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Quantize all layers but those that hurt: as few as it takes.

    Raises:
        ConversionError: when even with half of the layers in floating point the answers differ too much, or when there
            is no other layer.
    """
    import onnx

    wanted = 1 - (context.accuracy_drop_points if context.accuracy_drop_points is not None else 1.0) / 100
    groups = groups_of(onnx.load(str(source)), QUANTIZED)
    expected = answers_of(source, context, SENSITIVITY_ROWS)

    def harm(exclude: list[str]) -> float:
        _quantize(source, target, context, parameters, exclude=exclude)
        return relative_error(expected, answers_of(target, context, SENSITIVITY_ROWS))

    ordered = ordered_by_harm(groups, harm, found)
    expected = answers_of(source, context, ROWS)
    agreement = 0.0

    def agrees(left: list[str]) -> bool:
        nonlocal agreement
        _quantize(source, target, context, parameters, exclude=left)
        agreement = agreement_of(expected, answers_of(target, context, ROWS))
        return agreement >= wanted

    if not left_in_float(ordered, agrees, found):
        detail = f"with half of its layers in floating point it still agrees with the source on only {agreement:.1%}"
        raise ConversionError("too_sensitive", detail)
    check_quantized(onnx.load(str(source)), onnx.load(str(target)))
    found["agreement"] = round(agreement, 5)


def _quantize(
    source: Path, target: Path, context: Context, parameters: dict[str, Parameter], *, exclude: list[str]
) -> bool:
    """Write the quantized net; returns whether weights have a scale a channel.

    Some nets are too old for that, and of some the quantizer then makes files that do not load: those get one a tensor.
    """
    import onnx

    if opset_of(onnx.load(str(source))) >= PER_CHANNEL_OPSET:
        _quantize_static(source, target, context, parameters, exclude, per_channel=True)
        if loads(onnx.load(str(target))):
            return True
    _quantize_static(source, target, context, parameters, exclude, per_channel=False)
    return False


def _quantize_static(
    source: Path,
    target: Path,
    context: Context,
    parameters: dict[str, Parameter],
    exclude: list[str],
    *,
    per_channel: bool,
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    method = CalibrationMethod[str(parameters["calibration"])]
    kinds = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    quantize_static(
        str(source),
        str(target),
        None,
        quant_format=QuantFormat.QDQ,
        activation_type=kinds[str(parameters["activations"])],
        weight_type=QuantType.QInt8,
        per_channel=per_channel,
        reduce_range=parameters["weight_bits"] == 7,
        calibrate_method=method,
        nodes_to_exclude=exclude,
        calibration_cache_path=str(_ranges(source, context, method)),
    )


def _ranges(source: Path, context: Context, method: Any) -> Path:
    """The file with the ranges of every activation, made once a file and method."""
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data

    cache = context.folder / f"ranges-{method.name}-{file_digest(source)}.json"
    if cache.exists():
        return cache
    assert context.calibration is not None
    augmented = context.folder / "augmented.onnx"
    calibrator = create_calibrator(
        source,
        op_types_to_calibrate=None,
        augmented_model_path=str(augmented),
        calibrate_method=method,
        extra_options={"num_bins": ENTROPY_BINS} if method.name == "Entropy" else {},
    )
    rows = min(ROWS, context.calibration.rows)
    try:
        for start in range(0, rows, SLICE):
            calibrator.collect_data(Reader(context.calibration, start, min(start + SLICE, rows)))
        if method.name == "Entropy":
            calibrator.collector.get_entropy_threshold = entropy_threshold
        save_tensors_data(calibrator.compute_data(), cache)
    except ValueError as error:
        detail = (
            f"{method.name} finds no ranges for this net's activations ({str(error)[:120]}): MinMax needs no histogram"
        )
        raise ConversionError("no_ranges", detail) from None
    augmented.unlink(missing_ok=True)
    return cache
