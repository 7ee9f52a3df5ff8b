"""Missing values: rows that hold NaN, for models that are made for it.

Trees send NaN down the branch that was learned for it, and imputers put a number in its place. Any other model answers
NaN, or, where a choice or a maximum lies behind it, a number that means nothing. So NaN is taken where all that reads
an input is made for it, and the model's answers are finite.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from agent.protocol.manifest import ModelFormat
from agent.trial.dataset import Dataset
from converters.dataset import only, rows_missing
from converters.evaluate import answers_finitely
from converters.job import SourceFile
from converters.package import Specs, manifest_for
from converters.sample import ANY
from converters.sources import nodes_of, parse_onnx

TAKE = frozenset({"TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor", "Imputer", "IsNaN"})
# What gives NaN for NaN, number by number, or moves numbers about.
PASS = frozenset({
    "Add", "ArrayFeatureExtractor", "Cast", "Concat", "Div", "FeatureVectorizer", "Flatten", "Gather", "Identity",
    "Mul", "Reshape", "Scaler", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze",
})  # fmt: skip


def missing_taken(main: SourceFile, specs: Specs) -> Callable[[str, Dataset], bool]:
    """Whether a source takes NaN in an input, as `load_dataset` asks it.

    Args:
        main: the source form whose answers count.
        specs: its own.
    """
    path = Path(main.path)

    def taken(name: str, rows: Dataset) -> bool:
        if main.format is not ModelFormat.ONNX or not made_for_missing(path, name):
            return False
        return answers_finitely(manifest_for(path, specs, main.format, ANY), path, rows)

    return taken


def made_for_missing(path: Path, name: str) -> bool:
    """Whether all that reads an input of an ONNX file, or what is passed on of it, takes NaN for a missing value."""
    graph = parse_onnx(path).graph
    carried = {name}
    for node in graph.node:
        itself, *within = nodes_of([node])
        if any(carried.intersection(one.input) for one in within):
            return False
        if not carried.intersection(itself.input) or itself.op_type in TAKE:
            continue
        if itself.op_type not in PASS:
            return False
        carried.update(itself.output)
    return carried.isdisjoint(value.name for value in graph.output)


def without_missing(data: Dataset) -> Dataset:
    """The rows without NaN, to find ranges of activations on; all of them where each has one."""
    whole = np.flatnonzero(~rows_missing(data.inputs))
    return only(data, whole) if 0 < len(whole) < data.rows else data
