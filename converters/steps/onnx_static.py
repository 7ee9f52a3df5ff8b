"""ONNX in 8-bit integers with ranges from calibration data, by ONNX Runtime's quantizer.

uint8 activations and int8 weights per channel in QDQ form: measured to be 5 times as fast as the library's own defaults
on CPUs with VNNI. Ranges are collected a few rows at a time, because the library's histograms keep every activation of
everything they are given; they are kept for other recipes of the build.

Mixed precision leaves those layers in floating point that hurt most. How much a layer hurts is measured: it alone is
quantized, and the answers on calibration rows are compared with the source's. As many are left as it takes to agree.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from agent.trial.dataset import Dataset
from converters.errors import ConversionError
from converters.step import Context, Parameter

ROWS = 512
SLICE = 16
SENSITIVITY_ROWS = 64
GROUPS = 24
LEFT = (1, 2, 3, 5, 8, 12)
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
    source: Path, target: Path, _context: Context, _parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Fold constants, fuse what ONNX Runtime fuses, and infer shapes: quantizers do better work after it."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    except Exception:  # noqa: BLE001 (shape inference fails in many ways; the file as it is may still quantize)
        shutil.copyfile(source, target)
    model = onnx.load(str(target))
    for number, node in enumerate(model.graph.node):
        if not node.name:
            node.name = f"{node.op_type}_{number}"  # layers are left out of quantization by name
    onnx.save(model, str(target))


def static_int8(
    source: Path, target: Path, context: Context, parameters: dict[str, Parameter], _found: dict[str, Parameter]
) -> None:
    """Quantize every layer that can be."""
    _quantize(source, target, context, parameters, exclude=[])


def mixed_int8(
    source: Path, target: Path, context: Context, parameters: dict[str, Parameter], found: dict[str, Parameter]
) -> None:
    """Quantize all layers but those that hurt: as few as it takes.

    Raises:
        ConversionError: when even with half of the layers in floating point the answers differ too much.
    """
    wanted = 1 - (context.accuracy_drop_points if context.accuracy_drop_points is not None else 1.0) / 100
    groups = _groups(source)
    expected = _answers(source, context, SENSITIVITY_ROWS)
    errors = []
    for group in groups:
        others = [name for other in groups if other is not group for name in other]
        _quantize(source, target, context, parameters, exclude=others)
        errors.append(_error(expected, _answers(target, context, SENSITIVITY_ROWS)))
    ordered = [groups[index] for index in np.argsort(errors)[::-1]]
    expected = _answers(source, context, ROWS)
    agreement = 0.0
    for count in (one for one in LEFT if one <= max(1, (len(groups) + 1) // 2)):
        left = [name for group in ordered[:count] for name in group]
        _quantize(source, target, context, parameters, exclude=left)
        agreement = _agreement(expected, _answers(target, context, ROWS))
        if agreement >= wanted:
            found.update(layers=sum(map(len, groups)), left_in_float=len(left), agreement=round(agreement, 5))
            return
    detail = f"with half of its layers in floating point it still agrees with the source on only {agreement:.1%}"
    raise ConversionError("too_sensitive", detail)


def _groups(source: Path) -> list[list[str]]:
    """Names of quantizable layers in order, in at most `GROUPS` rows of neighbours."""
    import onnx

    names = [node.name for node in onnx.load(str(source)).graph.node if node.op_type in QUANTIZED and node.name]
    if not names:
        raise ConversionError("nothing_to_do", "the net has no layer that static int8 would quantize")
    size = -(-len(names) // GROUPS)
    return [names[start : start + size] for start in range(0, len(names), size)]


def _error(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """Mean squared difference, as a share of the expected's variance."""
    wide = expected.astype(np.float64)
    return float(((wide - got.astype(np.float64)) ** 2).mean() / max(wide.var(), 1e-12))


def _quantize(
    source: Path, target: Path, context: Context, parameters: dict[str, Parameter], *, exclude: list[str]
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
        per_channel=True,
        calibrate_method=method,
        nodes_to_exclude=exclude,
        calibration_cache_path=str(_ranges(source, context, method)),
    )


def _ranges(source: Path, context: Context, method: Any) -> Path:
    """The file with the ranges of every activation, made once a file and method."""
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data

    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cache = context.folder / f"ranges-{method.name}-{digest}.json"
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
    for start in range(0, rows, SLICE):
        calibrator.collect_data(Reader(context.calibration, start, min(start + SLICE, rows)))
    save_tensors_data(calibrator.compute_data(), cache)
    augmented.unlink(missing_ok=True)
    return cache


def _answers(path: Path, context: Context, most: int) -> np.ndarray[Any, Any]:
    """The first output on the calibration rows."""
    import onnxruntime

    assert context.calibration is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rows = context.calibration.part(0, most).batches(1)
    return np.concatenate([np.atleast_1d(session.run(None, row)[0]) for row in rows])


def _agreement(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """Share of rows with the same answer."""
    from agent.trial.scoring import answers

    return float((answers(expected) == answers(got)).mean())
