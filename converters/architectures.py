"""Architectures that an operator registered: nets whose code is installed here, so that weights alone may be uploaded.

A package registers one by an entry point in the group `shoal.architectures`: a function without parameters that returns
a `torch.nn.Module`. What is installed is trusted; what is uploaded is safetensors, which hold numbers and no code.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from converters.dataset import example_rows
from converters.digest import source_files
from converters.errors import ConversionError
from converters.job import InspectJob, SourceFile, Weights

GROUP = "shoal.architectures"


def registered() -> list[str]:
    """Names of the architectures that packages here register, in alphabetical order; none of their code is run."""
    return sorted(_found())


def build_net(name: str) -> Any:
    """A fresh net of a registered architecture.

    Raises:
        ConversionError: `unknown_architecture`, naming those there are; `bad_architecture`, when its code fails.
    """
    found = _found().get(name)
    if found is None:
        known = ", ".join(registered()) or "none"
        detail = (
            f"architecture: no package on this machine registers {name!r} (registered: {known}); install one with an "
            f"entry point of that name in the group {GROUP}, on the server and on every conversion worker"
        )
        raise ConversionError("unknown_architecture", detail, "architecture")
    import torch

    try:
        net = found.load()()
    except Exception as error:  # noqa: BLE001 (an operator's code may raise anything)
        detail = f"architecture: {found.value}, which registers {name!r}, fails: {type(error).__name__}: {error}"
        raise ConversionError("bad_architecture", detail[:500], "architecture") from None
    if not isinstance(net, torch.nn.Module):
        detail = f"architecture: {found.value}, which registers {name!r}, returns {type(net).__name__}, not a net"
        raise ConversionError("bad_architecture", detail, "architecture")
    return net


def load_weights(weights: Weights) -> Any:
    """A net of a registered architecture with uploaded weights, in evaluation mode.

    Raises:
        ConversionError: as `build_net`; `bad_weights`, when they do not fit.
    """
    from converters.steps.export import fill

    return fill(build_net(weights.architecture), Path(weights.path), "sources")


def export_weights(job: InspectJob, folder: Path) -> tuple[SourceFile, ...]:
    """The source forms of weights, made in a folder; a job without weights has none.

    Raises:
        ConversionError: naming what is missing or does not fit.
    """
    from converters.steps.export import export_forms

    if job.weights is None:
        return ()
    rows = job.evaluation or job.calibration
    if rows is None:
        detail = "architecture: weights are exported on example rows: give an evaluation or a calibration set"
        raise ConversionError("no_examples", detail, "architecture")
    field = "evaluation" if job.evaluation else "calibration"
    examples = example_rows(Path(rows.path), field, job.processing)
    return source_files(export_forms(load_weights(job.weights), examples, folder, "exported"))


def _found() -> dict[str, EntryPoint]:
    return {one.name: one for one in entry_points(group=GROUP)}
