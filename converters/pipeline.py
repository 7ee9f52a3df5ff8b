"""The jobs: inspect an uploaded version, build a variant; to cut a net into stages is `sharding.shard`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from agent.protocol.manifest import ModelFormat, Precision
from agent.protocol.processing import Processing
from agent.trial.dataset import Dataset
from agent.trial.golden import pick_rows
from agent.trial.scoring import answers
from converters.architectures import export_weights
from converters.candidate import candidate_of, judged, name_of, opened
from converters.dataset import load_dataset
from converters.errors import ConversionError
from converters.evaluate import Run, check_finite, measure, run_file, time_in_turns
from converters.forms import main_source, source_specs
from converters.inspection import ProgressCall, inspect
from converters.job import (
    BuildJob,
    BuildResult,
    Candidate,
    DataFile,
    DerivedSource,
    Inspection,
    Job,
    Measurements,
    Sharding,
    ShardJob,
)
from converters.missing import missing_taken, without_missing
from converters.package import as_seen, manifest_for, with_examples
from converters.planner import choose, fates, forms, plan, repairs
from converters.sample import sample_rows, without_mixing
from converters.sharding.shard import shard
from converters.starts import Start, litert_start, of_derived, program_start
from converters.step import Context, Recipe

TIMED_AGAIN = 4


def run(job: Job, folder: Path, progress: ProgressCall) -> Inspection | BuildResult | Sharding:
    """Do a job in a working folder.

    Raises:
        ConversionError: when it can't be done, with the remedy.
    """
    if isinstance(job, BuildJob):
        return build(job, folder, progress)
    if isinstance(job, ShardJob):
        return shard(job, folder, progress)
    progress(0.05, "export" if job.weights else "load")
    exported = export_weights(job, folder)
    found = inspect(msgspec.structs.replace(job, sources=(*job.sources, *exported)), progress)
    names = tuple(msgspec.structs.replace(one, path=Path(one.path).name) for one in exported)
    return msgspec.structs.replace(found, exported=names)


def build(job: BuildJob, folder: Path, progress: ProgressCall) -> BuildResult:
    """Build, measure and choose a variant.

    Raises:
        ConversionError: when the source or the data sets can't be used.
    """
    progress(0.02, "evaluate source")
    specs, _, _ = source_specs(job.sources)
    main = main_source(job.sources)
    inputs = specs[main.format][0]
    taken = missing_taken(main, specs[main.format])
    calibration = _data(job.calibration, inputs, "calibration", job.processing, taken)
    evaluation = _data(job.evaluation, inputs, "evaluation", job.processing, taken)
    data = evaluation or sample_rows({"calibration": calibration} if calibration else {}, main, specs[main.format])
    specs = {form: with_examples(one, data) for form, one in specs.items()}
    path = Path(main.path)
    job = msgspec.structs.replace(job, target=without_mixing(job.target, main, specs[main.format], data))
    source_run = run_file(manifest_for(path, specs[main.format], main.format, job.target), path, data, pick_rows(data))
    if evaluation is not None or calibration is not None:
        check_finite(source_run, data.rows, "evaluation" if evaluation is not None else "calibration")
    specs[main.format] = as_seen(specs[main.format], source_run.shapes)
    source = measure(source_run, source_run, data, path.stat().st_size)
    recipes = plan(job.target, main.format)
    starts: dict[ModelFormat, Start | str] = {
        one.format: Start(one, Path(one.path), specs[one.format]) for one in job.sources
    }
    missing = {recipe.source for recipe in recipes} - starts.keys()
    if ModelFormat.TFLITE in missing:
        progress(0.05, "convert to LiteRT")
        starts[ModelFormat.TFLITE] = litert_start(job, starts.get(ModelFormat.ONNX), data, source_run, folder)
    if ModelFormat.PT2 in missing:
        progress(0.05, "export for torch")
        specs[ModelFormat.PT2] = specs[main.format]
        starts[ModelFormat.PT2] = program_start(job, specs[main.format], data, source_run, folder)
    ranges = without_missing(calibration) if calibration else None
    context = Context(folder, ranges, job.target.accuracy_drop_points)
    trained, problems = _trained(job, folder, progress)
    job = msgspec.structs.replace(job, derived=(*job.derived, *trained))
    candidates: list[Candidate] = []

    def attempt(tried: list[tuple[Recipe, Start | str | None]], start: float, end: float) -> None:
        for index, (recipe, begin) in enumerate(tried):
            progress(start + (end - start) * index / len(tried), name_of(recipe, begin))
            made = candidate_of(recipe, job, begin, context, data, source_run, folder, candidates)
            candidates.append(judged(made, job.target, source, evaluated=evaluation is not None))

    attempt([(recipe, starts.get(recipe.source)) for recipe in recipes], 0.1, 0.4 if job.derived else 0.7)
    plain = tuple(candidates)
    attempt([(recipe, starts.get(recipe.source)) for recipe in repairs(job.target, plain, source)], 0.7, 0.75)
    for derived in job.derived:
        attempt(of_derived(derived, recipes, plain, specs), 0.4, 0.85)
    candidates += [Candidate("training", Precision.FP32, error=problem) for problem in problems]
    progress(0.85, "time the best once more")
    candidates = _timed_again(candidates, job, source, data, folder, evaluated=evaluation is not None)
    progress(0.95, "baseline")
    baseline = _baseline(job, data, source_run) if evaluation is not None else None
    chosen = choose(candidates, job.target)
    progress(1.0, "choose")
    return BuildResult(
        source=source,
        candidates=tuple(fates(candidates, chosen, job.target, source)),
        chosen=chosen,
        baseline=baseline,
        baseline_version=job.baseline.version if baseline and job.baseline else None,
    )


def _trained(job: BuildJob, folder: Path, progress: ProgressCall) -> tuple[tuple[DerivedSource, ...], list[str]]:
    """Nets that training passes make, where the job orders some, and why others could not be made."""
    if job.training is None:
        return (), []
    from converters.training.derive import train

    evaluation = Path(job.evaluation.path) if job.evaluation else None
    return train(
        job.training,
        evaluation,
        folder,
        lambda text: progress(0.08, text),
        forms=forms(job.target),
    )


def _timed_again(
    candidates: list[Candidate], job: BuildJob, source: Measurements, data: Dataset, folder: Path, *, evaluated: bool
) -> list[Candidate]:
    """The candidates, with the fastest timed in turns: a noisy moment must not decide between them."""
    built = [
        index
        for index, one in enumerate(candidates)
        if one.measurements is not None and one.path is not None and not one.same_as and not one.compiled_for
    ]
    within = [index for index in built if candidates[index].within_budgets] or built
    fastest = sorted(within, key=lambda index: _p50(candidates[index]))[:TIMED_AGAIN]
    plain = [index for index in built if candidates[index].precision is Precision.FP32 and index not in fastest]
    again = [*fastest, *plain[:1]]
    if len(again) < 2:
        return candidates
    times = time_in_turns([opened(candidates[index], job.target, folder) for index in again], data)
    found = list(candidates)
    for index, (p50, p95) in zip(again, times, strict=True):
        measured = candidates[index].measurements
        assert measured is not None
        fresh = msgspec.structs.replace(measured, latency_p50_ms=p50, latency_p95_ms=p95)
        renewed = msgspec.structs.replace(candidates[index], measurements=fresh)
        found[index] = judged(renewed, job.target, source, evaluated=evaluated)
    return found


def _p50(candidate: Candidate) -> float:
    return candidate.measurements.latency_p50_ms if candidate.measurements else float("inf")


def _data(
    file: DataFile | None,
    inputs: Any,
    field: str,
    processing: Processing | None,
    taken: Callable[[str, Dataset], bool] | None = None,
) -> Dataset | None:
    return load_dataset(Path(file.path), inputs, field, processing, taken) if file is not None else None


def _baseline(job: BuildJob, data: Dataset, source: Run) -> Measurements | None:
    """An earlier version's artifact on this version's data; None where it can't take that data."""
    baseline = job.baseline
    if baseline is None:
        return None
    path, specs = Path(baseline.path), (baseline.inputs, baseline.outputs)
    try:
        if baseline.processing not in {None, job.processing} and job.processing is not None:
            data = _data(job.evaluation, baseline.inputs, "evaluation", baseline.processing) or data
        if {spec.name for spec in baseline.inputs} != set(data.inputs) and len(data.inputs) == 1:
            data = Dataset({baseline.inputs[0].name: next(iter(data.inputs.values()))}, data.labels, data.rows)
        done = run_file(manifest_for(path, specs, baseline.format, job.target), path, data)
        if answers(done.first_output).shape != answers(source.first_output).shape:
            return None
        return measure(done, source, data, path.stat().st_size)
    except (ConversionError, KeyError):
        return None
