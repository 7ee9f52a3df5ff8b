"""Where recipes begin: the source forms, what training passes made of them, and LiteRT files made of ONNX ones."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from agent.protocol.manifest import ModelFormat
from agent.trial.dataset import Dataset
from converters.architectures import load_weights
from converters.errors import ConversionError
from converters.evaluate import Run, run_file
from converters.forms import DisagreeError, largest_difference
from converters.job import BuildJob, Candidate, DerivedSource, PassRecord, SourceFile, Weights
from converters.package import Specs, manifest_for, tflite_specs
from converters.sample import ANY, SAMPLE_ROWS
from converters.step import Recipe, tool_versions
from converters.steps import onnx_to_litert
from converters.steps.export import quiet
from converters.steps.torch_export import NO_WEIGHTS, export_program


@dataclass(frozen=True)
class Start:
    """Where recipes of a format begin: a file, what it takes and gives, and how it came to be."""

    source: SourceFile | Weights
    path: Path
    specs: Specs
    passes: tuple[PassRecord, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    name: str = ""  # of the training passes that made it, where some did


def of_derived(
    derived: DerivedSource, recipes: list[Recipe], plain: tuple[Candidate, ...], specs: dict[ModelFormat, Specs]
) -> list[tuple[Recipe, Start | str | None]]:
    """What is tried of a derived net: every recipe that could be built of the source itself."""
    forms = {one.format: one for one in derived.sources}
    tried: list[tuple[Recipe, Start | str | None]] = []
    for recipe, before in zip(recipes, plain, strict=True):
        form = forms.get(recipe.source)
        if before.measurements is not None and form is not None:
            start = Start(form, Path(form.path), specs[recipe.source], derived.passes, derived.tools, derived.name)
            tried.append((recipe, start))
    return tried


def litert_start(job: BuildJob, onnx: Start | str | None, data: Dataset, source_run: Run, folder: Path) -> Start | str:
    """A TFLite form made from the ONNX one and compared with it on real rows; or why there is none."""
    if not isinstance(onnx, Start):
        return "the version has neither a TFLite form nor an ONNX one: push it with one"
    if job.onnx2tf_python is None:
        return (
            "the version has no TFLite form: push it with one (`shoal model push` of a torch net writes it where "
            "litert-torch is installed, or name a .tflite file), or let the server convert ONNX (`make setup-onnx2tf`, "
            "or SHOAL_ONNX2TF_PYTHON)"
        )
    sample = data.part(0, min(data.rows, SAMPLE_ROWS))
    try:
        made = onnx_to_litert.convert(onnx.path, folder, Path(job.onnx2tf_python), sample)
    except ConversionError as error:
        return error.detail
    try:
        specs = _checked_litert(made.path, onnx.specs, sample, source_run)
    except (ConversionError, DisagreeError) as error:
        return f"what onnx2tf made {error}: {onnx_to_litert.REMEDY}"
    except Exception as error:  # noqa: BLE001 (a file that a stranger's net became may break anything; it is refused)
        said = f"{type(error).__name__}: {str(error)[:300]}"
        return f"what onnx2tf made could not be checked ({said}): {onnx_to_litert.REMEDY}"
    return Start(onnx.source, made.path, specs, made.passes, made.tools)


def program_start(job: BuildJob, specs: Specs, data: Dataset, source_run: Run, folder: Path) -> Start | str:
    """A program of torch made of the version's weights and compared with its source on real rows; or why there is none.

    Args:
        job: the build.
        specs: of the source, in the order of the net's parameters: it was exported of the same weights.
        data: rows to export and to compare on.
        source_run: the source's answers to them.
        folder: gets the file.
    """
    if job.weights is None:
        return NO_WEIGHTS
    path = folder / "exported.pt2"
    started = time.monotonic()
    sample = data.part(0, min(data.rows, SAMPLE_ROWS))
    try:
        net = load_weights(job.weights)
        with quiet():
            export_program(net, [sample.inputs[spec.name] for spec in specs[0]], path)
        run = run_file(manifest_for(path, specs, ModelFormat.PT2, ANY), path, sample)
        largest_difference(run.outputs, {name: value[: sample.rows] for name, value in source_run.outputs.items()})
    except ConversionError as error:
        return error.detail
    except DisagreeError as error:
        return f"what torch.export made {error}: report this net"
    except Exception as error:  # noqa: BLE001 (an operator's code and torch may raise anything; other forms go on)
        return f"torch.export can't follow the net ({type(error).__name__}: {str(error)[:300]})"
    seconds = round(time.monotonic() - started, 3)
    made = PassRecord("torch-export", {}, seconds, Path(job.weights.path).stat().st_size, path.stat().st_size)
    return Start(job.weights, path, specs, (made,), tool_versions(("torch",)))


def _checked_litert(path: Path, source: Specs, sample: Dataset, source_run: Run) -> Specs:
    """Specs of a converted file, with the order of axes in its answers; it answers the sample as the source did.

    Raises:
        ConversionError: when it does not load or run.
        DisagreeError: when it answers otherwise.
    """
    try:
        specs = tflite_specs(path, source)
        plain = run_file(manifest_for(path, specs, ModelFormat.TFLITE, ANY), path, sample)
    except ConversionError as error:
        said = error.detail.removeprefix("sources: ")
        raise ConversionError("not_convertible", f"does not run in LiteRT ({said})", "sources") from None
    expected = {name: value[: sample.rows] for name, value in source_run.outputs.items()}
    orders = {name: onnx_to_litert.find_permutation(expected[name], plain.outputs[name]) for name in expected}
    outputs = tuple(msgspec.structs.replace(spec, permutation=orders[spec.name]) for spec in source[1])
    found = {
        name: value.transpose(np.argsort(orders[name] or range(value.ndim))) for name, value in plain.outputs.items()
    }
    largest_difference(found, expected)
    return tflite_specs(path, (source[0], outputs))
