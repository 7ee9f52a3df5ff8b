"""The source forms of a version: what each takes and gives, and whether two are of one net."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from agent.protocol.manifest import ModelFormat
from agent.trial.dataset import Array
from converters.job import SourceFile
from converters.package import Specs, onnx_specs, tflite_specs
from converters.sources import check_tflite, parse_onnx

RELATIVE_TOLERANCE = 1e-2


def main_source(sources: tuple[SourceFile, ...]) -> SourceFile:
    """The form whose names and answers count: ONNX where there is one."""
    return next((one for one in sources if one.format is ModelFormat.ONNX), sources[0])


def source_specs(sources: tuple[SourceFile, ...]) -> tuple[dict[ModelFormat, Specs], dict[str, int], int]:
    """What each form takes and gives, operators of the ONNX form, and numbers in its weights.

    Raises:
        ConversionError: `bad_model`.
    """
    specs: dict[ModelFormat, Specs] = {}
    operators: dict[str, int] = {}
    parameters = 0
    for source in sorted(sources, key=lambda one: one.format is not ModelFormat.ONNX):
        if source.format is ModelFormat.ONNX:
            model = parse_onnx(Path(source.path))
            specs[source.format] = onnx_specs(model)
            operators = dict(Counter(node.op_type for node in model.graph.node))
            parameters = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
        else:
            check_tflite(Path(source.path))
            specs[source.format] = tflite_specs(Path(source.path), specs.get(ModelFormat.ONNX))
    return specs, operators, parameters


class DisagreeError(Exception):
    """Two files do not answer alike; says where and by how much."""


def largest_difference(mine: dict[str, Array], theirs: dict[str, Array]) -> float:
    """The largest absolute difference of answers to the same rows.

    Raises:
        DisagreeError: when they are of other shapes, or further apart than rounding explains.
    """
    largest = 0.0
    for name, value in theirs.items():
        if mine[name].shape != value.shape:
            raise DisagreeError(
                f"answers {name!r} with shape {list(mine[name].shape)} where the other answers {list(value.shape)}"
            )
        if value.dtype.kind in "OU":
            if not np.array_equal(mine[name], value):
                raise DisagreeError(f"answers other texts on real inputs in {name!r}, so it is not the same net")
            continue
        exact = value.astype(np.float64)
        difference = float(np.abs(mine[name].astype(np.float64) - exact).max(initial=0.0))
        scale = float(np.abs(exact).max(initial=0.0)) or 1.0
        # Written so that NaN disagrees.
        if not difference <= RELATIVE_TOLERANCE * scale:
            raise DisagreeError(f"differs by {difference:.3g} on real inputs in {name!r}, so it is not the same net")
        largest = max(largest, difference)
    return largest
