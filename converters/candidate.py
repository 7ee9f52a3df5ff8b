"""One recipe carried out: its file, its measurements, its lineage, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Manifest, ModelFormat
from agent.runtimes.base import Tensors, reason
from agent.trial.dataset import Dataset
from agent.trial.golden import made, pick_rows, write
from converters.cache import CandidateCache
from converters.digest import file_digest
from converters.errors import ConversionError
from converters.evaluate import Run, measure, run_file, takes
from converters.isolate import isolated
from converters.job import BuildJob, Candidate, GoldenFile, Lineage, Measurements, PassRecord, Target
from converters.package import as_seen, manifest_for, tflite_specs
from converters.planner import excesses
from converters.starts import Start
from converters.step import Context, Recipe, run_recipe, tool_versions


def name_of(recipe: Recipe, start: Start | str | None) -> str:
    """A candidate's name: its recipe's, behind that of the training passes where some came first."""
    return f"{start.name}+{recipe.name}" if isinstance(start, Start) and start.name else recipe.name


def candidate_of(
    recipe: Recipe,
    job: BuildJob,
    start: Start | str | None,
    context: Context,
    data: Dataset,
    source_run: Run,
    folder: Path,
    earlier: Sequence[Candidate],
) -> Candidate:
    """Make and measure what a recipe makes; where that fails, the candidate says why.

    Args:
        recipe: what to do.
        job: the build.
        start: where it begins; a sentence where there is nothing to begin with.
        context: of the build's steps.
        data: rows to measure on.
        source_run: the source's answers to them.
        folder: gets the file.
        earlier: candidates before it: of equal files one is measured.
    """
    name = name_of(recipe, start)
    target = folder / f"{name}.{recipe.result.value}"
    if not isinstance(start, Start):
        detail = start or "the version has no ONNX form: push it with one"
        return Candidate(name, recipe.precision, error=detail)
    if recipe.needs_calibration and context.calibration is None:
        detail = "static int8 needs calibration data: push the version with a calibration set"
        return Candidate(name, recipe.precision, error=detail)
    cache = CandidateCache(job)
    rows = pick_rows(data)
    try:
        key = cache.key(recipe, start.path)
        # What only an accelerator can run is compiled anew: what it was made of is measured, and lies in no cache.
        kept = None if recipe.compiled_for else cache.load(key, target)
        runnable = folder / f"{name}.plain.{recipe.result.value}" if recipe.compiled_for else target
        copy = runnable if recipe.compiled_for else None
        records = kept.passes if kept else _made(recipe, start, target, context, copy, job.target)
        digest = file_digest(target)
        twin = next((one for one in earlier if one.digest == digest and one.measurements and not one.same_as), None)
        result_specs = start.specs
        if recipe.result is ModelFormat.TFLITE:
            result_specs = tflite_specs(runnable, start.specs)
        manifest = manifest_for(runnable, result_specs, recipe.result, job.target, precision=recipe.precision)
        if twin is not None and twin.measurements is not None:
            measured, golden = twin.measurements, twin.golden
            result_specs = (result_specs[0], twin.outputs)
        elif kept and cache.reuses_answers:
            ran = run_file(manifest, target, data.part(0, manifest.max_batch), rows)
            golden = _golden(ran, source_run, rows, folder / f"{name}.golden.npz")
            measured = _timed(kept.measurements, ran)
            result_specs = as_seen(result_specs, ran.shapes)
        else:
            ran = run_file(manifest, runnable, data, rows)
            golden = _golden(ran, source_run, rows, folder / f"{name}.golden.npz")
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
    measured = _as_known(measured, recipe, job)
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
        golden=golden,
    )


def _golden(run: Run, source: Run, rows: tuple[Tensors, ...], path: Path) -> GoldenFile | None:
    """Golden inputs of a file that was run; None without rows, or where they are too large to send along."""
    if not rows:
        return None
    write(made(rows, run.golden, source.golden), path)
    size = path.stat().st_size
    return GoldenFile(path.name, file_digest(path), size) if size <= LIMITS.golden_bytes else None


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


def _as_known(measured: Measurements, recipe: Recipe, job: BuildJob) -> Measurements:
    """Measurements that claim no more than was measured."""
    if recipe.elsewhere:
        measured = msgspec.structs.replace(measured, provider=f"{measured.provider}, not by {recipe.runtime}")
    if job.evaluation is None:
        measured = msgspec.structs.replace(measured, samples=0, accuracy=None)
    return measured


def judged(candidate: Candidate, target: Target, source: Measurements, *, evaluated: bool) -> Candidate:
    """The candidate, with whether it keeps the target's bounds; without an evaluation set none is held to."""
    measured = candidate.measurements
    if measured is None or not evaluated:
        return candidate
    return msgspec.structs.replace(candidate, within_budgets=not excesses(measured, target, source))


def opened(candidate: Candidate, target: Target, folder: Path) -> tuple[Manifest, Path]:
    """A candidate's manifest and file, to run it once more."""
    assert candidate.path is not None
    assert candidate.format is not None
    path = folder / candidate.path
    specs = (candidate.inputs, candidate.outputs)
    return manifest_for(path, specs, candidate.format, target, precision=candidate.precision), path
