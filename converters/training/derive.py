"""From a plan of passes to sources where recipes start: trains, and exports what comes out."""

from __future__ import annotations

from pathlib import Path

from agent.protocol.manifest import ModelFormat
from converters.architectures import build_net, load_weights
from converters.digest import source_files
from converters.errors import ConversionError
from converters.job import DerivedSource, TrainingOrder
from converters.step import tool_versions
from converters.steps.export import export_forms
from converters.training.compress import TOOLS, Compressed, CompressionPlan, compress
from converters.training.data import Rows, read_training, read_validation
from converters.training.fit import Fitting, Say


def train(
    order: TrainingOrder, evaluation: Path | None, folder: Path, say: Say, *, forms: frozenset[ModelFormat]
) -> tuple[tuple[DerivedSource, ...], list[str]]:
    """Carry out what was ordered of a net of a registered architecture.

    Args:
        order: which passes, on what.
        evaluation: labelled rows that decide how far passes go, as they decide between recipes; None for none.
        folder: gets the files.
        say: told how far it is.
        forms: in which nets are wanted beside ONNX.

    Returns:
        The sources, and why a pass could not be done, a sentence each.

    Raises:
        ConversionError: when nothing can be trained at all.
    """
    rows = read_training(Path(order.data.path))
    student = order.student
    plan = CompressionPlan(
        prune=order.prune,
        sparsity=order.sparsity,
        student=None if student is None else lambda: build_net(student),
        quantize_aware=order.quantize_aware,
        budget=order.budget_points,
        how=Fitting(epochs=order.epochs, rate=order.learning_rate, seed=order.seed),
    )
    validation = read_validation(evaluation, rows)
    nets, problems = compress(load_weights(order.weights), rows, plan, say, validation=validation)
    made = []
    for one in nets:
        say(f"export {one.name}")
        try:
            made.append(derived_source(one, rows, folder, forms=forms))
        except ConversionError as problem:
            problems.append(f"{one.name}: {problem.detail}")
    return tuple(made), problems


def derived_source(one: Compressed, rows: Rows, folder: Path, *, forms: frozenset[ModelFormat]) -> DerivedSource:
    """A trained net as files: ONNX, and the other forms that are wanted.

    Raises:
        ConversionError: when it can't be exported.
    """
    made = export_forms(
        one.net,
        rows.first(2).inputs,
        folder,
        one.name,
        tflite=ModelFormat.TFLITE in forms,
        program=ModelFormat.PT2 in forms,
    )
    return DerivedSource(one.name, source_files(made), one.passes, tool_versions(TOOLS))
