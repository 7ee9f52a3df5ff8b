"""What a step is: a function from files to a file with declared parameters, and the record it leaves."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.protocol.manifest import ModelFormat, Precision, RuntimeName
from converters.dataset import Dataset
from converters.job import PassRecord

Parameter = str | int | float | bool | None


@dataclass(frozen=True)
class Recipe:
    """One way to make a candidate.

    Attributes:
        name: such as `onnx-static-u8s8`.
        runtime: that loads its result.
        precision: of its result.
        source: format of the source form it starts from.
        needs_calibration: whether it runs on calibration data.
        parameters: declared, and written to the lineage.
        run: makes the file: (source path, target path, calibration data, parameters).
        tools: distributions whose versions belong to the lineage.
    """

    name: str
    runtime: RuntimeName
    precision: Precision
    source: ModelFormat
    needs_calibration: bool
    parameters: dict[str, Parameter]
    run: Callable[[Path, Path, Dataset | None, dict[str, Parameter]], None]
    tools: tuple[str, ...]

    @property
    def result(self) -> ModelFormat:
        """Format of its result."""
        return ModelFormat.ONNX if self.runtime is RuntimeName.ONNX else ModelFormat.TFLITE


def run_recipe(recipe: Recipe, source: Path, target: Path, calibration: Dataset | None) -> PassRecord:
    """Run a recipe and record it."""
    started = time.monotonic()
    recipe.run(source, target, calibration, recipe.parameters)
    return PassRecord(recipe.name, dict(recipe.parameters), round(time.monotonic() - started, 3))


def tool_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of distributions."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
