"""Passes with training data for `shoal convert`: the net's own code runs, so they run here, in no bounded process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fleet_server.cli.output import errors, fail


@dataclass(frozen=True)
class Wanted:
    """What `shoal convert` was asked to do with training data; see its options."""

    training: Path | None
    validation: Path | None
    prune: str | None
    sparsity: float | None
    distill: str | None
    quantize_aware: bool
    epochs: float
    learning_rate: float
    budget_points: float
    seed: int

    @property
    def any(self) -> bool:
        """Whether a pass was asked for."""
        return bool(self.prune or self.sparsity is not None or self.distill or self.quantize_aware)


def training_rows(wanted: Wanted, sources: list[str]) -> Any:
    """The rows to train on, None where nothing is to be trained; refuses options before anything is exported."""
    if not wanted.any and wanted.training is None:
        return None
    if wanted.training is None:
        raise fail("--prune, --sparsity, --distill and --quantize-aware need rows to train on: --training T.npz", 2)
    if len(sources) != 1 or ".py:" not in sources[0]:
        raise fail("training needs a net as code: name net.py:function, with --weights W.safetensors", 2)
    if not wanted.training.is_file():
        raise fail(f"--training: there is no file {str(wanted.training)!r}", 2)
    from converters.errors import ConversionError
    from converters.steps.export import net_builder
    from converters.training.data import read_training

    pruned_share(wanted.prune)
    try:
        if wanted.distill:
            net_builder(wanted.distill)
        return read_training(wanted.training)
    except ConversionError as error:
        raise fail(error.detail) from None


def derived_sources(
    wanted: Wanted, rows: Any, spec: str, weights: Path | None, folder: Path, out: Path, *, tflite: bool
) -> list[Any]:
    """Train on rows that `training_rows` gave, export each net, in TFLite too if that is wanted, and save its weights.

    Returns:
        `converters.job.DerivedSource` of each net.
    """
    from converters.errors import ConversionError
    from converters.steps import export
    from converters.training.compress import CompressionPlan, compress
    from converters.training.data import read_validation
    from converters.training.fit import Fitting

    prune = wanted.prune or (None if wanted.any else "adaptive")
    try:
        net = export.load_net(spec, weights)
        plan = CompressionPlan(
            prune=pruned_share(prune),
            sparsity=wanted.sparsity,
            student=export.net_builder(wanted.distill) if wanted.distill else None,
            quantize_aware=wanted.quantize_aware,
            budget=wanted.budget_points,
            how=Fitting(epochs=wanted.epochs, rate=wanted.learning_rate, seed=wanted.seed),
        )
        shown = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*shown, console=errors, transient=True, disable=not errors.is_terminal) as progress:
            task = progress.add_task("training", total=None)
            nets, problems = compress(
                net,
                rows,
                plan,
                lambda text: progress.update(task, description=text),
                validation=read_validation(wanted.validation, rows),
            )
        for problem in problems:
            errors.print(f"[yellow]left out:[/] {problem}")
        return [_exported(one, rows, folder, out, tflite=tflite) for one in nets]
    except (ConversionError, ValueError, OSError) as error:
        raise fail(str(error)) from None


def pruned_share(text: str | None) -> str | float | None:
    """What `--prune` says: `adaptive`, a share, or nothing."""
    if text in {None, "adaptive"}:
        return text
    try:
        share = float(text or "")
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise fail(f"--prune: {text!r} is neither adaptive nor the share of the work to be left, such as 0.5", 2)
    return share


def _exported(one: Any, rows: Any, folder: Path, out: Path, *, tflite: bool) -> Any:
    """Files of a net as source forms; its weights stay with the user."""
    from agent.protocol.manifest import ModelFormat
    from converters.training.derive import derived_source
    from converters.training.refit import save_weights

    errors.print(f"exporting {one.name} …")
    made = derived_source(one, rows, folder, forms=frozenset({ModelFormat.TFLITE}) if tflite else frozenset())
    out.mkdir(parents=True, exist_ok=True)
    save_weights(one.net, out / f"{one.name}.safetensors")
    return made
