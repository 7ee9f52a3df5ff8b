"""What a conversion process is asked and what it answers: plain data, written as JSON files in its working folder.

A conversion runs in a process of its own, because it loads files that strangers made; whoever starts that process
(`fleet_server.conversions`) talks to it only through these shapes.
"""

from __future__ import annotations

import msgspec

from agent.protocol.manifest import ModelFormat, Precision, TensorSpec
from agent.protocol.processing import Processing


class SourceFile(msgspec.Struct, frozen=True):
    """One source form of a version, on this machine's disk.

    Attributes:
        format: of the file.
        digest: its SHA-256.
        path: where it lies.
    """

    format: ModelFormat
    digest: str
    path: str


class DataFile(msgspec.Struct, frozen=True):
    """A data set: an `.npz` whose arrays are named as the model's inputs (or `x` for its only one), labels as `y`.

    Attributes:
        digest: its SHA-256.
        path: where it lies.
    """

    digest: str
    path: str


class Weights(msgspec.Struct, frozen=True):
    """Uploaded safetensors for an architecture that an operator registered (`converters.architectures`).

    Attributes:
        architecture: its name.
        digest: SHA-256 of the file.
        path: where it lies.
    """

    architecture: str
    digest: str
    path: str

    @property
    def format(self) -> str:
        """As lineages name it."""
        return "safetensors"


class InspectJob(msgspec.Struct, frozen=True, tag="inspect"):
    """Check an uploaded version: its files load, agree with each other, and fit its data.

    Attributes:
        sources: its files; none where `weights` are exported to make them.
        calibration: see `BuildJob`.
        evaluation: likewise.
        classes: how many class names there are; None for none.
        weights: of a registered architecture.
        training: rows to train on, which only have to fit.
        processing: how images become inputs and outputs answers; None where nothing is declared.
    """

    sources: tuple[SourceFile, ...]
    calibration: DataFile | None = None
    evaluation: DataFile | None = None
    classes: int | None = None
    weights: Weights | None = None
    training: DataFile | None = None
    processing: Processing | None = None


class Inspection(msgspec.Struct, frozen=True):
    """What the check found.

    Attributes:
        inputs: of the model, as its ONNX form names them (its TFLite form where that is the only one).
        outputs: likewise.
        agreement: for each other form, the largest absolute difference of its outputs on real inputs (or on seeded
            random ones where there is no data), by format.
        calibration_samples: rows of the calibration set.
        evaluation_samples: rows of the evaluation set.
        operators: how often each operator stands in the source.
        parameters: numbers in its weights.
        exported: source forms that were made of weights; their paths are relative to the working folder.
        training_samples: rows of the training set.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    agreement: dict[str, float] = {}
    calibration_samples: int = 0
    evaluation_samples: int = 0
    operators: dict[str, int] = {}
    parameters: int = 0
    exported: tuple[SourceFile, ...] = ()
    training_samples: int = 0


class Target(msgspec.Struct, frozen=True):
    """What a variant is built for: the part of a profile that conversion needs.

    Attributes:
        profile: its name.
        runtime: that loads the variant; where it comes with no agent, it gets the source form as it is.
        providers: execution providers the device will try.
        precisions: recipes to try.
        threads: intra-op threads.
        max_batch: the largest batch worth making.
        provider_options: of a provider, by its name, as ONNX Runtime takes them.
        objective: `latency`, `size` or `accuracy`.
        accuracy_drop_points: accuracy it may lose against the source; None is no bound.
        latency_p95_ms: bound of one inference; None is no bound.
        size_mb: bound of the artifact in 1,000,000 bytes; None is no bound.
        memory_mb: bound of what loading adds to a process, in MiB; None is no bound.
    """

    profile: str
    runtime: str
    providers: tuple[str, ...]
    precisions: tuple[Precision, ...]
    threads: int = 1
    max_batch: int = 32
    objective: str = "latency"
    accuracy_drop_points: float | None = 1.0
    latency_p95_ms: float | None = None
    size_mb: float | None = None
    memory_mb: float | None = None
    provider_options: dict[str, dict[str, str]] = {}


class PassRecord(msgspec.Struct, frozen=True):
    """One step of a conversion: name, parameters with what it found out, seconds, and bytes before and after it."""

    name: str
    parameters: dict[str, str | int | float | bool | None]
    seconds: float
    bytes_before: int = 0
    bytes_after: int = 0


class DerivedSource(msgspec.Struct, frozen=True):
    """Forms of a net that training passes made of the source: recipes start there too.

    Its answers are compared with those of the source.

    Attributes:
        name: stands before the recipe's in candidates, such as `pruned`.
        sources: its files.
        passes: how it came to be.
        tools: distribution versions that made it.
    """

    name: str
    sources: tuple[SourceFile, ...]
    passes: tuple[PassRecord, ...]
    tools: dict[str, str]


class TrainingOrder(msgspec.Struct, frozen=True):
    """Passes with training data, on a net of a registered architecture; see `converters.training.compress`.

    Attributes:
        weights: of the net.
        data: rows to train on, with targets as `y`.
        prune: `adaptive`, the share of the work that is to be left, or None.
        sparsity: share of weights that are to be zero; None for no such net.
        student: registered architecture that is to learn from the net; None for none.
        quantize_aware: whether each net is also fine-tuned for integers.
        budget_points: that adaptive pruning may cost.
        epochs: of each fine-tuning.
        learning_rate: the highest of each.
        seed: of every random choice.
    """

    weights: Weights
    data: DataFile
    prune: str | float | None = None
    sparsity: float | None = None
    student: str | None = None
    quantize_aware: bool = False
    budget_points: float = 0.5
    epochs: float = 5.0
    learning_rate: float = 1e-3
    seed: int = 0


class BaselineArtifact(msgspec.Struct, frozen=True):
    """The artifact an earlier version runs on this profile: the new one is compared with it on the same data.

    Images of that data become its inputs as its own `processing` says.
    """

    version: str
    path: str
    format: ModelFormat
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    processing: Processing | None = None


class CacheFolder(msgspec.Struct, frozen=True):
    """Earlier conversions that may be of use.

    Attributes:
        path: of an existing folder; `converters.cache` says what lies in it. New ones are added.
        machine: the kind of machine, such as its CPU features: answers of quantized nets differ between kinds.
    """

    path: str
    machine: str


class BuildJob(msgspec.Struct, frozen=True, tag="build"):
    """Build, measure and choose a variant.

    Attributes:
        sources: forms of the version.
        target: what for.
        calibration: for static int8; the evaluation set is never used for that.
        evaluation: held-out, labelled; without labels, fidelity to the source stands for accuracy.
        baseline: of an earlier version, when there is one.
        onnx2tf_python: interpreter of an environment with onnx2tf; None where there is none, and an ONNX form alone
            makes no LiteRT variant.
        derived: of the source, by training passes that were made before.
        training: passes to make first, whose nets are tried like those in `derived`.
        cache: of earlier conversions; None converts everything.
        processing: how images of the data sets become inputs; None where they hold none.
        weights: of which programs of torch are made; None where there are none, or none is wanted.
    """

    sources: tuple[SourceFile, ...]
    target: Target
    calibration: DataFile | None = None
    evaluation: DataFile | None = None
    baseline: BaselineArtifact | None = None
    onnx2tf_python: str | None = None
    derived: tuple[DerivedSource, ...] = ()
    training: TrainingOrder | None = None
    cache: CacheFolder | None = None
    processing: Processing | None = None
    weights: Weights | None = None


class ShardDevice(msgspec.Struct, frozen=True):
    """A device that may have a stage: its id, bytes a stage may take, its speed beside this machine's, its link."""

    device: str
    memory: float
    speed: float = 1.0
    bytes_per_s: float = 12.5e6


class ShardJob(msgspec.Struct, frozen=True, tag="shard"):
    """Cut a net into stages for devices.

    Attributes:
        source: its ONNX form.
        devices: to choose from.
        stages: how many; None for the fewest that fit.
        rows: of a micro-batch, whose activations a device holds.
        calibration: rows whose activations the stages are calibrated on.
        evaluation: rows whose activations the stages are evaluated on.
        processing: how images of the data sets become inputs; None where they hold none.
    """

    source: SourceFile
    devices: tuple[ShardDevice, ...]
    stages: int | None = None
    rows: int = 1
    calibration: DataFile | None = None
    evaluation: DataFile | None = None
    processing: Processing | None = None


class StageFile(msgspec.Struct, frozen=True):
    """One stage of a net.

    Attributes:
        path: of its ONNX file, in the working folder.
        digest: SHA-256 of it.
        size: bytes of it.
        evaluation: the activations that come to it of the evaluation set, an `.npz` in the working folder.
        calibration: likewise of the calibration set; None where there is none.
        device: that it was planned for.
        nodes: that are placed in it.
        compute_s: measured here for one row of the optimized stage, over the device's speed.
        weight_bytes: of its weights.
        activation_bytes: held at most, for all rows of a micro-batch.
        bytes_in: that one row brings.
        bytes_out: that one row sends on.
        transfer_s: both over the device's link.
    """

    path: str
    digest: str
    size: int
    evaluation: DataFile | None
    calibration: DataFile | None
    device: str
    nodes: int
    compute_s: float
    weight_bytes: int
    activation_bytes: int
    bytes_in: int
    bytes_out: int
    transfer_s: float


class Sharding(msgspec.Struct, frozen=True):
    """A net in stages.

    Attributes:
        stages: in order.
        whole_s: seconds of one row of the whole net, measured here.
        difference: largest difference of the stages' answers from the whole's, both optimized; relative where over 1.
        exact: whether they answer bit for bit the same where no node is optimized.
        quantized: whether integers of one byte alone pass from stage to stage.
    """

    stages: tuple[StageFile, ...]
    whole_s: float
    difference: float
    exact: bool
    quantized: bool


class ClassScore(msgspec.Struct, frozen=True):
    """One class: precision, recall and F1 from 0 to 1 (None where nothing was predicted or labelled), and its rows."""

    label: int
    precision: float | None
    recall: float | None
    f1: float | None
    support: int


class Measurements(msgspec.Struct, frozen=True):
    """What was measured of one file on the evaluation data.

    Attributes:
        size: bytes.
        samples: rows of evaluation data that were run.
        accuracy: share of right answers, 0 to 1; None without labels.
        macro_precision: mean over classes.
        macro_recall: mean over classes.
        macro_f1: mean over classes.
        classes: each class.
        agreement: share of rows whose answer is the source's (largest output), 0 to 1.
        fidelity: see `converters.evaluate.fidelity`, 0 to 1; None where no output is of floating point.
        max_difference: largest absolute difference of any output from the source's.
        latency_p50_ms: of one inference of one row.
        latency_p95_ms: likewise.
        memory_mb: resident memory that loading and running it added to a fresh process, in MiB; None if unmeasured.
        provider: execution provider that ran, as the session says.
        latency_p99_ms: likewise; None where it was not measured.
        load_s: seconds to load and warm up; None where it was not measured.
        against_fp32: median time over fp32's, timed in turns on a device; None where it was not.
        measured_on: `server`, or the ids of devices, of which the worst counts.
    """

    size: int
    samples: int
    accuracy: float | None
    macro_precision: float | None
    macro_recall: float | None
    macro_f1: float | None
    classes: tuple[ClassScore, ...]
    agreement: float
    max_difference: float
    latency_p50_ms: float
    latency_p95_ms: float
    memory_mb: float | None
    provider: str
    latency_p99_ms: float | None = None
    load_s: float | None = None
    measured_on: str = "server"
    against_fp32: float | None = None
    fidelity: float | None = None

    @property
    def quality(self) -> float:
        """What an accuracy budget is about, 0 to 1: accuracy where there are labels, else closeness to the source."""
        if self.accuracy is not None:
            return self.accuracy
        return self.agreement if self.fidelity is None else self.fidelity


class Lineage(msgspec.Struct, frozen=True):
    """Where a file came from.

    Attributes:
        source_digest: of the source form that was converted.
        source_format: its format, or `safetensors`, where what was converted was made of weights for that.
        calibration_digest: of the calibration set, when it was used.
        evaluation_digest: of the evaluation set, when there is one.
        passes: in the order they ran.
        tools: distribution versions, such as `{"onnxruntime": "1.32.0"}`.
    """

    source_digest: str
    source_format: str
    calibration_digest: str | None
    evaluation_digest: str | None
    passes: tuple[PassRecord, ...]
    tools: dict[str, str]


class GoldenFile(msgspec.Struct, frozen=True):
    """Golden inputs of a candidate (`agent.trial.golden`): name of the file in the working folder, SHA-256, bytes."""

    path: str
    digest: str
    size: int


class Candidate(msgspec.Struct, frozen=True):
    """One recipe that was tried.

    Attributes:
        recipe: its name, such as `onnx-static-u8s8`.
        precision: of the recipe.
        path: of the file, relative to the working folder; None when it could not be built.
        digest: SHA-256 of the file.
        format: of the file.
        inputs: as the artifact's manifest will say: source names, with `file_name` where a converter renamed one.
        outputs: likewise.
        max_batch: the largest batch the file takes; 1 where its batch dimension is fixed.
        measurements: None when it could not be built or run.
        lineage: None when it could not be built.
        within_budgets: whether it keeps every bound of the target.
        error: why it could not be built or run.
        on_front: whether no other candidate within budgets is as good in accuracy, latency and size and better in one.
        fate: a sentence: why it was picked, or why not.
        reused: whether its bytes are those of an earlier conversion of the same files by the same tools.
        same_as: recipe of an earlier candidate with the same bytes, whose measurements these are.
        compiled_for: accelerator that alone can run the file, such as `edgetpu`; the measurements are those of the file
            before it was compiled.
        golden: rows with its answers; None where no row is small enough, or it could not be built.
    """

    recipe: str
    precision: Precision
    path: str | None = None
    digest: str | None = None
    format: ModelFormat | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    max_batch: int = 1
    measurements: Measurements | None = None
    lineage: Lineage | None = None
    within_budgets: bool = False
    error: str | None = None
    on_front: bool = False
    fate: str = ""
    reused: bool = False
    same_as: str = ""
    compiled_for: str = ""
    golden: GoldenFile | None = None

    @property
    def files(self) -> dict[str, str]:
        """The files that belong to it in the working folder: digests by path."""
        found = {self.path: self.digest} if self.path is not None and self.digest is not None else {}
        return found | ({self.golden.path: self.golden.digest} if self.golden is not None else {})


class BuildResult(msgspec.Struct, frozen=True):
    """Everything that was tried, and what was chosen.

    Attributes:
        source: measurements of the source form itself.
        candidates: in the order they were tried.
        chosen: index of the best candidate (within budgets if any is, else the nearest to them, so that the gate
            can say what it lacks); None when none could be built.
        baseline: measurements of the baseline artifact on this version's evaluation data.
        baseline_version: its version.
    """

    source: Measurements
    candidates: tuple[Candidate, ...]
    chosen: int | None
    baseline: Measurements | None = None
    baseline_version: str | None = None


class JobError(msgspec.Struct, frozen=True):
    """Why a job could not be done: a stable code, a sentence with the remedy, and the field at fault when one is."""

    code: str
    detail: str
    field: str | None = None


class Progress(msgspec.Struct, frozen=True):
    """One line of a conversion process's standard output: how far it is, 0 to 1, and what it does."""

    fraction: float
    step: str


Job = InspectJob | BuildJob | ShardJob
JOB_FILE = "job.json"
RESULT_FILE = "result.json"
ERROR_FILE = "error.json"
