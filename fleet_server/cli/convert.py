"""`shoal convert`: what the server does to a version, here and without a server."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn

from fleet_server.cli.candidates import plot, report, table
from fleet_server.cli.compress import Wanted, derived_sources, training_rows
from fleet_server.cli.models import source_files
from fleet_server.cli.output import Json, Output, OutputOption, errors, fail, print_json, show_fitting
from fleet_server.cli.profiles import read_profile

MEMORY_MB = 8192
TIMEOUT_S = 3600.0


def convert(
    sources: Annotated[list[str], typer.Argument(help="model.onnx and/or model.tflite, or net.py:function.")],
    profile: Annotated[str, typer.Option(help="A shipped profile's name, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for artifact, manifest, report and plot.")],
    weights: Annotated[Path | None, typer.Option(help="Safetensors for net.py:function.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Rows for static int8: an .npz with an array for each input.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="Held-out rows, as .npz, with their class indices as `y`.")
    ] = None,
    training: Annotated[
        Path | None, typer.Option(help="Rows to train on, as .npz, with their targets as `y`: for net.py:function.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Rows with targets to decide by how far to prune. Default: the evaluation rows."),
    ] = None,
    prune: Annotated[
        str | None,
        typer.Option(help="Remove channels: adaptive, or the share of the work to be left. Default with --training."),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Also a net with this share of zeros.", min=0.01, max=0.99)
    ] = None,
    distill: Annotated[
        str | None, typer.Option(help="Also teach a smaller net: student.py:function, without weights.")
    ] = None,
    quantize_aware: Annotated[bool, typer.Option(help="Also fine-tune each net for integers.")] = False,  # noqa: FBT002
    epochs: Annotated[float, typer.Option(help="Of each fine-tuning.", min=0.01)] = 5.0,
    learning_rate: Annotated[float, typer.Option(help="The highest of each fine-tuning.", min=1e-7)] = 1e-3,
    budget_points: Annotated[float, typer.Option(help="Points that adaptive pruning may cost.", min=0.0)] = 0.5,
    seed: Annotated[int, typer.Option(help="Of every random choice in training.", min=0)] = 0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Convert a model for a kind of device on this machine, without a server.

    Tries every recipe of the profile, measures each here, and writes the best. Exit code 1 when none keeps the budgets.
    With --training the net is pruned and fine-tuned first, and every recipe is tried on what comes out too.

    Example: shoal convert m.onnx --profile raspberry-pi-5 --evaluation e.npz --out variant
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").mkdir()
        spec = read_profile(profile)
        wanted = Wanted(
            training,
            validation or evaluation,
            prune,
            sparsity,
            distill,
            quantize_aware,
            epochs,
            learning_rate,
            budget_points,
            seed,
        )
        rows = training_rows(wanted, sources)
        tflite = _wants_tflite(spec)
        files = source_files(sources, weights, evaluation or calibration, folder, tflite=tflite)
        _check(files, calibration, evaluation, folder / "work")
        derived: list[Any] = []
        if rows is not None:
            derived = derived_sources(wanted, rows, sources[0], weights, folder, out, tflite=tflite)
        result, verdict, manifest = _build(files, derived, spec, calibration, evaluation, folder / "work")
        out.mkdir(parents=True, exist_ok=True)
        candidates = result["candidates"]
        picture = _plot(candidates, out, f"for {spec.name}")
        if manifest is not None:
            chosen = candidates[result["chosen"]]
            shutil.copyfile(folder / "work" / chosen["path"], out / f"model.{chosen['format']}")
            if chosen["golden"] is not None:
                shutil.copyfile(folder / "work" / chosen["golden"]["path"], out / "golden.npz")
            (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    checks = "; ".join(f"{check['detail']} ({'holds' if check['holds'] else 'MISSED'})" for check in verdict["checks"])
    facts = [
        ("profile", spec.name),
        ("measured on", "this machine, not on a device of the profile"),
        ("gate", f"{'passed' if verdict['passed'] else 'refused'}: {checks or 'nothing to check'}"),
    ]
    (out / "report.md").write_text(report(f"Variant for {spec.name}", facts, candidates, picture))
    if output is Output.JSON:
        print_json({**result, "gate": verdict})
    else:
        show_fitting(lambda width: table(candidates, width))
        errors.print(f"{'passed' if verdict['passed'] else '[red]refused[/]'} by the gate; see {out / 'report.md'}")
    if not verdict["passed"]:
        raise typer.Exit(1)


def _wants_tflite(spec: Any) -> bool:
    """Whether a recipe for the profile begins with a TFLite file."""
    from agent.protocol.manifest import ModelFormat
    from converters.planner import forms
    from fleet_server.conversions.service import build_target

    return ModelFormat.TFLITE in forms(build_target(spec.name, spec))


def _check(files: dict[str, Path], calibration: Path | None, evaluation: Path | None, work: Path) -> None:
    """Refuse what does not load or fit, before hours of training."""
    from converters.job import Inspection, InspectJob
    from fleet_server.conversions.process import Bounds, ConversionFailedError, run_job

    for path in (calibration, evaluation):
        if path is not None and not path.is_file():
            raise fail(f"{path}: there is no such file", 2)
    job = InspectJob(_sources(files), _data(calibration), _data(evaluation))
    try:
        with errors.status("check the files"):
            run_job(job, work, Inspection, Bounds(TIMEOUT_S, MEMORY_MB))
    except ConversionFailedError as error:
        raise fail(error.error.detail) from None


def _sources(files: dict[str, Path]) -> tuple[Any, ...]:
    from agent.protocol.manifest import ModelFormat
    from converters.digest import source_files

    return source_files({ModelFormat(form): path for form, path in files.items()})


def _data(path: Path | None) -> Any:
    from converters.digest import file_digest
    from converters.job import DataFile

    return DataFile(file_digest(path), str(path.absolute())) if path else None


def _build(
    files: dict[str, Path],
    derived: list[Any],
    spec: Any,
    calibration: Path | None,
    evaluation: Path | None,
    work: Path,
) -> tuple[Json, Json, Json | None]:
    """Runs the same bounded process as the server; returns the result, the gate's verdict, and the manifest."""
    import msgspec

    from converters.job import BuildJob, BuildResult
    from converters.package import manifest_for
    from fleet_server.catalog.schemas import GateSpec
    from fleet_server.conversions.gate import References, judge
    from fleet_server.conversions.process import Bounds, ConversionFailedError, run_job
    from fleet_server.conversions.service import build_target, golden_of, scheduling_of
    from fleet_server.settings import Settings

    target = build_target(spec.name, spec)
    python = Settings().effective_onnx2tf_python
    job = BuildJob(
        _sources(files),
        target,
        _data(calibration),
        _data(evaluation),
        onnx2tf_python=str(python) if python else None,
        derived=tuple(derived),
    )
    shown = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[step]}"))
    try:
        with Progress(*shown, console=errors, transient=True, disable=not errors.is_terminal) as progress:
            task = progress.add_task("converting", total=1.0, step="begin")
            result = run_job(
                job,
                work,
                BuildResult,
                Bounds(TIMEOUT_S, MEMORY_MB),
                on_progress=lambda now: progress.update(task, completed=now.fraction, step=now.step),
            )
    except ConversionFailedError as error:
        raise fail(error.error.detail) from None
    if result.chosen is None:
        for one in result.candidates:
            errors.print(f"{one.recipe}: {one.fate}", markup=False)
        raise fail("no recipe worked")
    chosen = result.candidates[result.chosen]
    references = References(result.source, result.baseline, result.baseline_version)
    verdict = judge(references, chosen, spec.budgets, GateSpec())
    assert chosen.path is not None
    assert chosen.format is not None
    plain = manifest_for(
        work / chosen.path, (chosen.inputs, chosen.outputs), chosen.format, target, precision=chosen.precision
    )
    manifest = msgspec.structs.replace(
        plain, digest=chosen.digest or "", golden=golden_of(chosen), scheduling=scheduling_of(spec)
    )
    return msgspec.to_builtins(result), verdict.model_dump(mode="json"), msgspec.to_builtins(manifest)


def _plot(candidates: list[Json], out: Path, title: str) -> str | None:
    """The plot's name, or None where matplotlib is not installed: the report is whole without it."""
    try:
        plot(candidates, out / "candidates.svg", title=title)
    except typer.Exit:
        sys.stderr.flush()
        return None
    return "candidates.svg"
