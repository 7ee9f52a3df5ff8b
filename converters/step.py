"""What a step is: a function from a file to a file with declared parameters, and the record it leaves.

A recipe is a row of steps. What one step finds out that others of the same build can use (ranges of activations, the
source's answers) lies in the build's context.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from agent.trial.dataset import Dataset
from converters.job import PassRecord

FORMATS = {
    RuntimeName.ONNX: ModelFormat.ONNX,
    RuntimeName.LITERT: ModelFormat.TFLITE,
    RuntimeName.TORCH: ModelFormat.PT2,
}
Parameter = str | int | float | bool | None


@dataclass
class Context:
    """What the steps of one build share.

    Attributes:
        folder: for working files; gone with the build.
        calibration: rows to calibrate on; None when there are none.
        accuracy_drop_points: what the target may lose; steps that trade precision for accuracy stop there.
    """

    folder: Path
    calibration: Dataset | None
    accuracy_drop_points: float | None = 1.0


# (source, target, context, parameters, found): makes `target` of `source`. What it finds out it leaves in `found`, for
# the record. It raises ConversionError when it can't, with what would help.
Step = Callable[[Path, Path, Context, dict[str, Parameter], dict[str, Parameter]], None]


@dataclass(frozen=True)
class Planned:
    """A step with its parameters."""

    name: str
    run: Step
    parameters: dict[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One way to make a candidate.

    Attributes:
        name: such as `onnx-static-u8s8`.
        runtime: that loads its result.
        precision: of its result.
        source: format of the source form it starts from.
        needs_calibration: whether it runs on calibration data.
        steps: in order.
        tools: distributions whose versions belong to the lineage.
        compiled_for: accelerator whose compiler is the last step; its result runs nowhere else, so what is measured on
            this machine is the file before that step.
        elsewhere: whether a runtime loads it that a package brings to devices: what is measured on this machine is the
            file in the runtime of its format.
        providers: execution providers it is for: the first that a target names must be one of them. Empty for all.
    """

    name: str
    runtime: str
    precision: Precision
    source: ModelFormat
    needs_calibration: bool
    steps: tuple[Planned, ...]
    tools: tuple[str, ...]
    compiled_for: str = ""
    elsewhere: bool = False
    providers: tuple[str, ...] = ()

    @property
    def result(self) -> ModelFormat:
        """Format of its result."""
        if self.elsewhere:
            return self.source
        return FORMATS[RuntimeName(self.runtime)]


def run_recipe(
    recipe: Recipe, source: Path, target: Path, context: Context, before: Path | None = None
) -> tuple[PassRecord, ...]:
    """Run a recipe's steps one after another.

    Args:
        recipe: what to do.
        source: where it starts; stays as it is.
        target: what it makes.
        context: of the build.
        before: gets a copy of what went into the last step; None where nobody wants it.

    Returns:
        A record of each step, with the bytes before and after it.
    """
    records = []
    with tempfile.TemporaryDirectory(dir=context.folder) as folder:
        current = source
        for number, step in enumerate(recipe.steps):
            last = number == len(recipe.steps) - 1
            if last and before is not None:
                shutil.copyfile(current, before)
            following = target if last else Path(folder) / f"{number}{target.suffix}"
            started = time.monotonic()
            found: dict[str, Parameter] = {}
            step.run(current, following, context, step.parameters, found)
            seconds = round(time.monotonic() - started, 3)
            sizes = (current.stat().st_size, following.stat().st_size)
            records.append(PassRecord(step.name, {**step.parameters, **found}, seconds, *sizes))
            current = following
    return tuple(records)


def tool_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of distributions."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
