"""The job that checks an uploaded version: its files load, agree with each other, and fit its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.protocol.processing_rules import ProcessingError, check
from agent.trial.dataset import Dataset
from converters.dataset import load_dataset
from converters.errors import ConversionError
from converters.evaluate import Run, check_finite, run_file
from converters.forms import DisagreeError, largest_difference, main_source, source_specs
from converters.job import DataFile, Inspection, InspectJob, SourceFile
from converters.missing import missing_taken
from converters.package import Specs, as_seen, manifest_for, with_examples
from converters.sample import ANY, SAMPLE_ROWS, sample_rows, without_mixing
from converters.training.data import read_training

ProgressCall = Callable[[float, str], None]


def inspect(job: InspectJob, progress: ProgressCall) -> Inspection:
    """Check an uploaded version: its files load, agree with each other, and fit its data."""
    progress(0.1, "load")
    specs, operators, parameters = source_specs(job.sources)
    main = main_source(job.sources)
    _check_processing(job, specs[main.format])
    taken = missing_taken(main, specs[main.format])
    data = {
        field: load_dataset(Path(file.path), specs[main.format][0], field, job.processing, taken)
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
    sample = sample_rows(data, main, specs[main.format])
    specs = {form: with_examples(one, sample) for form, one in specs.items()}
    target = without_mixing(ANY, main, specs[main.format], sample)
    first = run_file(manifest_for(Path(main.path), specs[main.format], main.format, target), Path(main.path), sample)
    if data:
        check_finite(first, sample.rows, "evaluation" if evaluation is not None else "calibration")
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


def _check_processing(job: InspectJob, specs: Specs) -> None:
    """A declaration has to fit the model's tensors."""
    if job.processing is None:
        return
    try:
        check(job.processing, *specs, job.classes or 0)
    except ProcessingError as error:
        raise ConversionError("bad_processing", error.detail, error.field) from None


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


def _check_labels(first: Run, evaluation: Dataset | None) -> None:
    if evaluation is None or evaluation.labels is None:
        return
    if len(first.first_output) != min(evaluation.rows, SAMPLE_ROWS):
        detail = (
            f"evaluation: `y` has a class for every row, but the first output gives {len(first.first_output)} answers "
            f"to {min(evaluation.rows, SAMPLE_ROWS)} rows: leave `y` out, and closeness to the source is measured"
        )
        raise ConversionError("bad_data", detail, "evaluation")
    if first.first_output.dtype.kind in "OU":
        detail = (
            "evaluation: `y` has class indices, but the model answers texts and no scores: leave `y` out, and "
            "closeness to the source is measured"
        )
        raise ConversionError("bad_data", detail, "evaluation")
    if first.first_output.dtype.kind in "iu" and first.first_output[0].size == 1:
        return  # it names classes itself, whatever their number
    classes = max(2, first.first_output.reshape(len(first.first_output), -1).shape[1])
    highest = int(evaluation.labels.max())
    if highest >= classes:
        detail = f"evaluation: label {highest} is outside the model's {classes} classes"
        raise ConversionError("bad_data", detail, "evaluation")


def _compare(source: SourceFile, specs: Specs, sample: Dataset, first: Run) -> float:
    """The largest difference of a form from the main one; forms of different nets are refused."""
    other = run_file(manifest_for(Path(source.path), specs, source.format, ANY), Path(source.path), sample)
    try:
        return largest_difference(other.outputs, first.outputs)
    except DisagreeError as error:
        detail = f"sources: the {source.format.value} form {error}: export both from the same weights"
        raise ConversionError("forms_disagree", detail, "sources") from None
