"""The two jobs: inspect an uploaded version, and build a variant."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agent.protocol.manifest import Manifest, ModelFormat, Precision, RuntimeName, TensorSpec
from agent.runtimes.base import reason
from agent.trial.dataset import Array, Dataset
from agent.trial.scoring import answers
from converters.architectures import export_weights
from converters.cache import CandidateCache
from converters.dataset import load_dataset
from converters.errors import ConversionError
from converters.evaluate import Run, measure, rows_mix, run_file, takes, time_in_turns
from converters.isolate import isolated
from converters.job import (
    BaselineArtifact,
    BuildJob,
    BuildResult,
    Candidate,
    DataFile,
    DerivedSource,
    Inspection,
    InspectJob,
    Job,
    Lineage,
    Measurements,
    PassRecord,
    SourceFile,
    Target,
)
from converters.package import Specs, as_seen, manifest_for, onnx_specs, tflite_specs, with_examples
from converters.planner import choose, excesses, fates, plan, repairs
from converters.sources import check_tflite, parse_onnx
from converters.step import Context, Recipe, run_recipe, tool_versions
from converters.steps import onnx_to_litert
from converters.training.data import read_training


@dataclass(frozen=True)
class Start:
    """Where recipes of a format begin: a file, what it takes and gives, and how it came to be."""

    source: SourceFile
    path: Path
    specs: Specs
    passes: tuple[PassRecord, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    name: str = ""  # of the training passes that made it, where some did


ProgressCall = Callable[[float, str], None]
SAMPLE_ROWS = 16
GUESSED_SIZES = (64, 256, 640, 16, 1)
TIMED_AGAIN = 4
RELATIVE_TOLERANCE = 1e-2
_ANY = Target("inspection", RuntimeName.ONNX, ("cpu",), ())


def run(job: Job, folder: Path, progress: ProgressCall) -> Inspection | BuildResult:
    """Do a job in a working folder.

    Raises:
        ConversionError: when it can't be done, with the remedy.
    """
    if isinstance(job, BuildJob):
        return build(job, folder, progress)
    progress(0.05, "export" if job.weights else "load")
    exported = export_weights(job, folder)
    found = inspect(msgspec.structs.replace(job, sources=(*job.sources, *exported)), progress)
    names = tuple(msgspec.structs.replace(one, path=Path(one.path).name) for one in exported)
    return msgspec.structs.replace(found, exported=names)


def inspect(job: InspectJob, progress: ProgressCall) -> Inspection:
    """Check an uploaded version: its files load, agree with each other, and fit its data."""
    progress(0.1, "load")
    specs, operators, parameters = _source_specs(job.sources)
    main = _main_source(job.sources)
    data = {
        field: load_dataset(Path(file.path), specs[main.format][0], field)
        for field, file in (("calibration", job.calibration), ("evaluation", job.evaluation))
        if file is not None
    }
    evaluation = data.get("evaluation")
    if evaluation is not None and evaluation.labels is not None and job.classes is not None:
        highest = int(evaluation.labels.max())
        if highest >= job.classes:
            detail = f"evaluation: label {highest} has no name: {job.classes} class names were given"
            raise ConversionError("bad_data", detail, "evaluation")
    progress(0.4, "run")
    sample = _sample(data, main, specs[main.format])
    specs = {form: with_examples(one, sample) for form, one in specs.items()}
    target = _without_mixing(_ANY, main, specs[main.format], sample)
    first = run_file(manifest_for(Path(main.path), specs[main.format], main.format, target), Path(main.path), sample)
    _check_labels(first, evaluation)
    agreement = {}
    for source in job.sources:
        if source is not main:
            progress(0.7, "compare forms")
            agreement[source.format.value] = _compare(source, specs[source.format], sample, first)
    return Inspection(
        inputs=specs[main.format][0],
        outputs=as_seen(specs[main.format], first.shapes)[1],
        agreement=agreement,
        calibration_samples=data["calibration"].rows if "calibration" in data else 0,
        evaluation_samples=evaluation.rows if evaluation else 0,
        operators=operators,
        parameters=parameters,
        training_samples=_training_samples(job.training, specs[main.format]),
    )


def _training_samples(training: DataFile | None, specs: Specs) -> int:
    """Rows to train on; they must have the inputs of the model."""
    if training is None:
        return 0
    rows = read_training(Path(training.path))
    names = [spec.name for spec in specs[0]]
    if sorted(rows.inputs) != sorted(names):
        detail = f"training: it has arrays {sorted(rows.inputs)} beside `y`, the model's inputs are {sorted(names)}"
        raise ConversionError("bad_data", detail, "training")
    return rows.count


def _main_source(sources: tuple[SourceFile, ...]) -> SourceFile:
    return next((one for one in sources if one.format is ModelFormat.ONNX), sources[0])


def _source_specs(sources: tuple[SourceFile, ...]) -> tuple[dict[ModelFormat, Specs], dict[str, int], int]:
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


def _sample(data: dict[str, Dataset], main: SourceFile, specs: Specs) -> Dataset:
    """Real rows where there are any; seeded random ones otherwise, of sizes that the file takes.

    Raises:
        ConversionError: when no guess at the sizes of its free dimensions runs.
    """
    real = data.get("evaluation") or data.get("calibration")
    if real is not None:
        return real.part(0, SAMPLE_ROWS)
    path, said = Path(main.path), ""
    for guess in guesses(specs):
        refused = takes(manifest_for(path, with_examples(specs, guess), main.format, _ANY), path)
        if refused is None:
            return guess
        said = said or refused
    free = ", ".join(f"{spec.name!r} {['any' if size < 0 else size for size in spec.shape]}" for spec in specs[0])
    detail = f"sources: it runs on no made-up row ({said}) of {free}: give --calibration or --evaluation with real rows"
    raise ConversionError("bad_model", detail.replace("'any'", "any"), "sources")


def guesses(specs: Specs) -> Iterator[Dataset]:
    """Random rows for a net of which no real ones are there, with one size after another for its free dimensions.

    Integers and truths are one, then zero: one is a token that most vocabularies have, and a mask that hides nothing.
    """
    inputs = specs[0]
    batched = all(spec.shape and spec.shape[0] in {-1, 1} for spec in inputs)
    free = any(size < 0 for spec in inputs for size in spec.shape[1 if batched else 0 :])
    firsts = (0,) if batched else (1, 0)  # 0: as large as any other free dimension
    for value in (1, 0):
        for size in GUESSED_SIZES if free else (1,):
            for first in firsts:
                yield _guess(inputs, batched=batched, first=first or size, size=size, value=value)


def _guess(inputs: tuple[TensorSpec, ...], *, batched: bool, first: int, size: int, value: int) -> Dataset:
    rng = np.random.default_rng(0)
    rows = 1 if any(spec.shape[:1] != (-1,) for spec in inputs) else SAMPLE_ROWS
    arrays = {}
    for spec in inputs:
        sizes = [(first if axis == 0 else size) if given < 0 else given for axis, given in enumerate(spec.shape)]
        shape = (rows, *sizes[1:]) if batched else (rows, *sizes)
        dtype = np.dtype(spec.dtype)
        arrays[spec.name] = rng.random(shape).astype(dtype) if dtype.kind == "f" else np.full(shape, value, dtype)
    return Dataset(arrays, None, rows, frozenset() if batched else frozenset(arrays))


def _without_mixing(target: Target, main: SourceFile, specs: Specs, data: Dataset) -> Target:
    """The target, with batches of one where the net mixes the rows of a batch."""
    path = Path(main.path)
    mixes = rows_mix(manifest_for(path, specs, main.format, target), path, data)
    return msgspec.structs.replace(target, max_batch=1) if mixes else target


def _check_labels(first: Run, evaluation: Dataset | None) -> None:
    if evaluation is None or evaluation.labels is None:
        return
    if len(first.first_output) != min(evaluation.rows, SAMPLE_ROWS):
        detail = (
            f"evaluation: `y` has a class for every row, but the first output gives {len(first.first_output)} answers "
            f"to {min(evaluation.rows, SAMPLE_ROWS)} rows: leave `y` out, and closeness to the source is measured"
        )
        raise ConversionError("bad_data", detail, "evaluation")
    classes = max(2, first.first_output.reshape(len(first.first_output), -1).shape[1])
    highest = int(evaluation.labels.max())
    if highest >= classes:
        detail = f"evaluation: label {highest} is outside the model's {classes} classes"
        raise ConversionError("bad_data", detail, "evaluation")


def _compare(source: SourceFile, specs: Specs, sample: Dataset, first: Run) -> float:
    """The largest difference of a form from the main one; forms of different nets are refused."""
    other = run_file(manifest_for(Path(source.path), specs, source.format, _ANY), Path(source.path), sample)
    try:
        return _largest_difference(other.outputs, first.outputs)
    except _DisagreeError as error:
        detail = f"sources: the {source.format.value} form {error}: export both from the same weights"
        raise ConversionError("forms_disagree", detail, "sources") from None


class _DisagreeError(Exception):
    """Two files do not answer alike; says where and by how much."""


def _largest_difference(mine: dict[str, Array], theirs: dict[str, Array]) -> float:
    largest = 0.0
    for name, value in theirs.items():
        if mine[name].shape != value.shape:
            raise _DisagreeError(
                f"answers {name!r} with shape {list(mine[name].shape)} where the other answers {list(value.shape)}"
            )
        exact = value.astype(np.float64)
        difference = float(np.abs(mine[name].astype(np.float64) - exact).max(initial=0.0))
        scale = float(np.abs(exact).max(initial=0.0)) or 1.0
        # Written so that NaN disagrees.
        if not difference <= RELATIVE_TOLERANCE * scale:
            raise _DisagreeError(f"differs by {difference:.3g} on real inputs in {name!r}, so it is not the same net")
        largest = max(largest, difference)
    return largest


def build(job: BuildJob, folder: Path, progress: ProgressCall) -> BuildResult:
    """Build, measure and choose a variant."""
    progress(0.02, "evaluate source")
    specs, _, _ = _source_specs(job.sources)
    main = _main_source(job.sources)
    inputs = specs[main.format][0]
    calibration = _data(job.calibration, inputs, "calibration")
    evaluation = _data(job.evaluation, inputs, "evaluation")
    data = evaluation or _sample({"calibration": calibration} if calibration else {}, main, specs[main.format])
    specs = {form: with_examples(one, data) for form, one in specs.items()}
    path = Path(main.path)
    job = msgspec.structs.replace(job, target=_without_mixing(job.target, main, specs[main.format], data))
    source_run = run_file(manifest_for(path, specs[main.format], main.format, job.target), path, data)
    specs[main.format] = as_seen(specs[main.format], source_run.shapes)
    source = measure(source_run, source_run, data, path.stat().st_size)
    recipes = plan(job.target)
    starts: dict[ModelFormat, Start | str] = {
        one.format: Start(one, Path(one.path), specs[one.format]) for one in job.sources
    }
    if any(recipe.source not in starts for recipe in recipes):
        progress(0.05, "convert to LiteRT")
        starts[ModelFormat.TFLITE] = _litert_start(job, starts.get(ModelFormat.ONNX), data, source_run, folder)
    context = Context(folder, calibration, job.target.accuracy_drop_points)
    trained, problems = _trained(job, folder, progress)
    job = msgspec.structs.replace(job, derived=(*job.derived, *trained))
    candidates: list[Candidate] = []

    def attempt(tried: list[tuple[Recipe, Start | str | None]], start: float, end: float) -> None:
        for index, (recipe, begin) in enumerate(tried):
            progress(start + (end - start) * index / len(tried), _name(recipe, begin))
            made = _candidate(recipe, job, begin, context, data, source_run, folder, candidates)
            candidates.append(_judged(made, job.target, source, evaluated=evaluation is not None))

    attempt([(recipe, starts.get(recipe.source)) for recipe in recipes], 0.1, 0.4 if job.derived else 0.7)
    plain = tuple(candidates)
    attempt([(recipe, starts.get(recipe.source)) for recipe in repairs(job.target, plain, source)], 0.7, 0.75)
    for derived in job.derived:
        attempt(_of_derived(derived, recipes, plain, specs), 0.4, 0.85)
    candidates += [Candidate("training", Precision.FP32, error=problem) for problem in problems]
    progress(0.85, "time the best once more")
    candidates = _timed_again(candidates, job, source, data, folder, evaluated=evaluation is not None)
    progress(0.95, "baseline")
    baseline = _baseline(job.baseline, job.target, data, source_run) if evaluation is not None else None
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
    return train(job.training, evaluation, folder, lambda text: progress(0.08, text))


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
    times = time_in_turns([_opened(candidates[index], job.target, folder) for index in again], data)
    found = list(candidates)
    for index, (p50, p95) in zip(again, times, strict=True):
        measured = candidates[index].measurements
        assert measured is not None
        fresh = msgspec.structs.replace(measured, latency_p50_ms=p50, latency_p95_ms=p95)
        renewed = msgspec.structs.replace(candidates[index], measurements=fresh)
        found[index] = _judged(renewed, job.target, source, evaluated=evaluated)
    return found


def _p50(candidate: Candidate) -> float:
    return candidate.measurements.latency_p50_ms if candidate.measurements else float("inf")


def _opened(candidate: Candidate, target: Target, folder: Path) -> tuple[Manifest, Path]:
    assert candidate.path is not None
    assert candidate.format is not None
    path = folder / candidate.path
    specs = (candidate.inputs, candidate.outputs)
    return manifest_for(path, specs, candidate.format, target, precision=candidate.precision), path


def _data(file: DataFile | None, inputs: Any, field: str) -> Dataset | None:
    return load_dataset(Path(file.path), inputs, field) if file is not None else None


def _name(recipe: Recipe, start: Start | str | None) -> str:
    """A candidate's name: its recipe's, behind that of the training passes where some came first."""
    return f"{start.name}+{recipe.name}" if isinstance(start, Start) and start.name else recipe.name


def _of_derived(
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


def _candidate(
    recipe: Recipe,
    job: BuildJob,
    start: Start | str | None,
    context: Context,
    data: Dataset,
    source_run: Run,
    folder: Path,
    earlier: Sequence[Candidate],
) -> Candidate:
    name = _name(recipe, start)
    target = folder / f"{name}.{recipe.result.value}"
    if not isinstance(start, Start):
        detail = start or "the version has no ONNX form: push it with one"
        return Candidate(name, recipe.precision, error=detail)
    if recipe.needs_calibration and context.calibration is None:
        detail = "static int8 needs calibration data: push the version with a calibration set"
        return Candidate(name, recipe.precision, error=detail)
    cache = CandidateCache(job)
    try:
        key = cache.key(recipe, start.path)
        # What only an accelerator can run is compiled anew: what it was made of is measured, and lies in no cache.
        kept = None if recipe.compiled_for else cache.load(key, target)
        runnable = folder / f"{name}.plain.{recipe.result.value}" if recipe.compiled_for else target
        copy = runnable if recipe.compiled_for else None
        records = kept.passes if kept else _made(recipe, start, target, context, copy, job.target)
        digest = hashlib.sha256(target.read_bytes()).hexdigest()
        twin = next((one for one in earlier if one.digest == digest and one.measurements and not one.same_as), None)
        result_specs = start.specs
        if recipe.result is ModelFormat.TFLITE:
            result_specs = tflite_specs(runnable, start.specs)
        manifest = manifest_for(runnable, result_specs, recipe.result, job.target, precision=recipe.precision)
        if twin is not None and twin.measurements is not None:
            measured = twin.measurements
            result_specs = (result_specs[0], twin.outputs)
        elif kept and cache.reuses_answers:
            ran = run_file(manifest, target, data.part(0, manifest.max_batch))
            measured = _timed(kept.measurements, ran)
            result_specs = as_seen(result_specs, ran.shapes)
        else:
            ran = run_file(manifest, runnable, data)
            measured = measure(ran, source_run, data, target.stat().st_size)
            result_specs = as_seen(result_specs, ran.shapes)
            if recipe.compiled_for:
                measured = msgspec.structs.replace(measured, provider=f"{measured.provider}, before it was compiled")
            else:
                cache.save(key, target, records, measured)
    except ConversionError as error:
        detail = error.detail.removeprefix("sources: ").removesuffix("; export it again")
        return Candidate(name, recipe.precision, error=detail)
    except Exception as error:  # noqa: BLE001 (quantizers raise anything; another recipe may work)
        detail = f"a tool of this recipe can't handle the net ({type(error).__name__}: {reason(error)})"
        return Candidate(name, recipe.precision, error=f"{detail}; other recipes are not touched by that")
    lineage = Lineage(
        source_digest=start.source.digest,
        source_format=start.source.format,
        calibration_digest=job.calibration.digest if recipe.needs_calibration and job.calibration else None,
        evaluation_digest=job.evaluation.digest if job.evaluation else None,
        passes=(*start.passes, *records),
        tools={**start.tools, **tool_versions(recipe.tools)},
    )
    if job.evaluation is None:
        measured = _without_samples(measured)
    return Candidate(
        name,
        recipe.precision,
        path=target.name,
        digest=digest,
        format=recipe.result,
        inputs=result_specs[0],
        outputs=result_specs[1],
        max_batch=manifest.max_batch,
        measurements=measured,
        lineage=lineage,
        reused=kept is not None,
        same_as=twin.recipe if twin is not None else "",
        compiled_for=recipe.compiled_for,
    )


def _made(
    recipe: Recipe, start: Start, target: Path, context: Context, copy: Path | None, profile: Target
) -> tuple[PassRecord, ...]:
    """Run a recipe. LiteRT's tools and kernels end the process on some nets, so they get one of their own."""
    if recipe.result is not ModelFormat.TFLITE:
        return run_recipe(recipe, start.path, target, context, copy)

    def work() -> tuple[PassRecord, ...]:
        records = run_recipe(recipe, start.path, target, context, copy)
        runnable = copy or target
        specs = tflite_specs(runnable, start.specs)
        takes(manifest_for(runnable, specs, recipe.result, profile, precision=recipe.precision), runnable)
        return records

    return isolated(work, context.folder)


def _timed(before: Measurements, run: Run) -> Measurements:
    """An earlier run's answers with this run's time and memory."""
    return msgspec.structs.replace(
        before,
        latency_p50_ms=run.latency_p50_ms,
        latency_p95_ms=run.latency_p95_ms,
        memory_mb=run.memory_mb,
        provider=run.provider,
    )


def _litert_start(job: BuildJob, onnx: Start | str | None, data: Dataset, source_run: Run, folder: Path) -> Start | str:
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
    except (ConversionError, _DisagreeError) as error:
        return f"what onnx2tf made {error}: {onnx_to_litert.REMEDY}"
    except Exception as error:  # noqa: BLE001 (a file that a stranger's net became may break anything; it is refused)
        said = f"{type(error).__name__}: {str(error)[:300]}"
        return f"what onnx2tf made could not be checked ({said}): {onnx_to_litert.REMEDY}"
    return Start(onnx.source, made.path, specs, made.passes, made.tools)


def _checked_litert(path: Path, source: Specs, sample: Dataset, source_run: Run) -> Specs:
    """Specs of a converted file, with the order of axes in its answers; it answers the sample as the source did.

    Raises:
        ConversionError: when it does not load or run.
        _DisagreeError: when it answers otherwise.
    """
    try:
        specs = tflite_specs(path, source)
        plain = run_file(manifest_for(path, specs, ModelFormat.TFLITE, _ANY), path, sample)
    except ConversionError as error:
        said = error.detail.removeprefix("sources: ")
        raise ConversionError("not_convertible", f"does not run in LiteRT ({said})", "sources") from None
    expected = {name: value[: sample.rows] for name, value in source_run.outputs.items()}
    orders = {name: onnx_to_litert.find_permutation(expected[name], plain.outputs[name]) for name in expected}
    outputs = tuple(msgspec.structs.replace(spec, permutation=orders[spec.name]) for spec in source[1])
    found = {
        name: value.transpose(np.argsort(orders[name] or range(value.ndim))) for name, value in plain.outputs.items()
    }
    _largest_difference(found, expected)
    return tflite_specs(path, (source[0], outputs))


def _without_samples(measured: Measurements) -> Measurements:
    return msgspec.structs.replace(measured, samples=0, accuracy=None)


def _judged(candidate: Candidate, target: Target, source: Measurements, *, evaluated: bool) -> Candidate:
    measured = candidate.measurements
    if measured is None or not evaluated:
        return candidate
    return msgspec.structs.replace(candidate, within_budgets=not excesses(measured, target, source))


def _baseline(baseline: BaselineArtifact | None, target: Target, data: Dataset, source: Run) -> Measurements | None:
    """An earlier version's artifact on this version's data; None where it can't take that data."""
    if baseline is None:
        return None
    path, specs = Path(baseline.path), (baseline.inputs, baseline.outputs)
    try:
        if {spec.name for spec in baseline.inputs} != set(data.inputs) and len(data.inputs) == 1:
            data = Dataset({baseline.inputs[0].name: next(iter(data.inputs.values()))}, data.labels, data.rows)
        done = run_file(manifest_for(path, specs, baseline.format, target), path, data)
        if answers(done.first_output).shape != answers(source.first_output).shape:
            return None
        return measure(done, source, data, path.stat().st_size)
    except (ConversionError, KeyError):
        return None
