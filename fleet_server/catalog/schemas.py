"""HTTP shapes of uploads, models, versions and variants."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from agent.protocol.manifest import ModelFormat
from agent.protocol.processing import Processing
from agent.protocol.processing_rules import ProcessingError, read, schema
from fleet_server.schemas import Digest, Failure, Name, Request, Response, example

SERVER = "server"  # where a variant was measured that no device has measured


class VariantState(StrEnum):
    """Where a variant is."""

    QUEUED = "queued"
    BUILDING = "building"
    READY = "ready"  # the gate let it pass: it may be rolled out
    REFUSED = "refused"  # it was built and measured, and the gate refused it
    FAILED = "failed"  # it could not be built
    CANCELLED = "cancelled"  # its build was given up because somebody asked for that


class UploadView(Response):
    """Bytes that were received whole; name them by digest when you create a version."""

    digest: Digest
    size: int


class TensorView(Response):
    """One input or output."""

    name: str
    dtype: str
    shape: list[int] = Field(description="-1 for a free dimension.")


class SourceFormat(StrEnum):
    """The format of a version's file."""

    ONNX = ModelFormat.ONNX.value
    TFLITE = ModelFormat.TFLITE.value
    SAFETENSORS = "safetensors"  # weights of a registered architecture, from which the server makes the other forms


class SourceFormCreate(Request):
    """One file of a version, uploaded before."""

    format: SourceFormat
    digest: Digest


class GateSpec(Request):
    """What every variant of the version must reach on its evaluation data, beside the profile's budgets."""

    min_accuracy: float | None = Field(None, ge=0, le=1, description="Lowest accuracy, 0 to 1; null is no bound.")
    max_regression_points: float | None = Field(
        2.0,
        ge=0,
        le=100,
        description=(
            "Accuracy it may lose, in percentage points, against the newest earlier version of the model with a "
            "ready variant, measured on this version's evaluation data; null lets any loss pass."
        ),
    )


def _declared(value: Any) -> Processing:
    try:
        return value if isinstance(value, Processing) else read(value)
    except ProcessingError as error:
        raise ValueError(error.detail) from None


DeclaredProcessing = Annotated[
    Processing, PlainValidator(_declared), PlainSerializer(msgspec.to_builtins), WithJsonSchema(schema())
]


class VersionCreate(Request):
    """A new version of a model; the model is made when it is not there."""

    model_config = example(
        name="2",
        sources=[{"format": "onnx", "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}],
        calibration="60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752",
        evaluation="fd61a03af4f77d870fc21e05e7e80678095c92d808cfb3b5c279ee04c74aca13",
        labels=["cat", "dog"],
        gate={"min_accuracy": 0.95, "max_regression_points": 1.0},
        processing={
            "image": {"size": [224, 224], "resize": "center-crop", "shorter_side": 256},
            "answer": {"kind": "classification", "activation": "softmax", "top_k": 3},
        },
    )

    name: Name
    sources: list[SourceFormCreate] = Field(min_length=1, max_length=4)
    architecture: Name | None = Field(
        None,
        description=(
            "Of safetensors: the registered architecture (`GET /architectures`) that takes them; the server exports "
            "the net on example rows of the evaluation or calibration set."
        ),
    )
    calibration: Digest | None = Field(None, description="Data set for static int8: an .npz, uploaded before.")
    evaluation: Digest | None = Field(None, description="Held-out data set with labels: an .npz, uploaded before.")
    training: Digest | None = Field(
        None, description="Rows to train on, with targets as `y`, for passes that train: an .npz, uploaded before."
    )
    labels: list[str] = Field(default_factory=list, max_length=10_000, description="Class names by index.")
    gate: GateSpec = Field(default_factory=GateSpec)
    processing: DeclaredProcessing | None = Field(
        None,
        description=(
            "How an image becomes the input and outputs an answer (`GET /schemas/processing`); it is signed with every "
            "variant. Null: devices take tensors alone."
        ),
    )

    @model_validator(mode="after")
    def _weights_have_an_architecture(self) -> Self:
        formats = [source.format for source in self.sources]
        if SourceFormat.SAFETENSORS not in formats:
            if self.architecture is not None:
                raise ValueError("architecture: it is for safetensors, and sources name none: leave it out")
            if self.training is not None:
                raise ValueError("training: only weights of a registered architecture can be trained: leave it out")
        elif self.architecture is None:
            raise ValueError("architecture: safetensors are weights alone: name the registered net that takes them")
        elif len(formats) > 1:
            raise ValueError("sources: the server makes the other forms of safetensors: name them alone")
        return self


class SourceFormView(Response):
    """One file of a version."""

    format: SourceFormat
    digest: str
    size: int
    exported: bool = Field(description="Whether the server made it of the version's weights.")


class VersionView(Response):
    """A version of a model."""

    id: str
    model: str
    name: str
    reference: str = Field(description="`model@version`, as commands take it.")
    sources: list[SourceFormView]
    inputs: list[TensorView]
    outputs: list[TensorView]
    labels: list[str]
    architecture: str | None
    calibration: str | None
    evaluation: str | None
    training: str | None
    gate: GateSpec
    processing: dict[str, Any] | None = Field(description="As it was pushed, with every default.")
    inspection: dict[str, Any] = Field(description="What the check at upload found: agreement of the forms, samples.")
    created_at: dt.datetime


class ModelView(Response):
    """A model."""

    id: str
    name: str
    latest_version: str | None
    created_at: dt.datetime


class ArchitectureView(Response):
    """A net whose code is installed on the server: weights of it may be pushed as safetensors."""

    name: str


class TrainingPlan(Request):
    """Passes with training data. The nets that they make are converted and measured beside the version as it is."""

    prune: Literal["adaptive"] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        "adaptive",
        description="Remove channels: `adaptive` within `budget_points`, or the share of the work that is to be left.",
    )
    sparsity: float | None = Field(None, gt=0, lt=1, description="Also a net with this share of zeros.")
    student: Name | None = Field(None, description="Also a net of this registered architecture that learns from it.")
    quantize_aware: bool = Field(False, description="Also fine-tune each net for integers.")
    budget_points: float = Field(0.5, ge=0, le=100, description="Points that adaptive pruning may cost.")
    epochs: float = Field(5.0, gt=0, le=10_000, description="Of each fine-tuning.")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="The highest of each fine-tuning.")
    seed: int = Field(0, ge=0, le=2**31 - 1)


class VariantBuild(Request):
    """Build a version for profiles. A variant that is there already and ready is built again only with `rebuild`."""

    model_config = example(version="mnist@2", profiles=["rpi5-litert", "gateway-onnx"])

    version: str = Field(description="`model@version`.", pattern=r"^[^@\s]+@[^@\s]+$")
    profiles: list[Name] = Field(min_length=1, max_length=100)
    rebuild: bool = False
    training: TrainingPlan | None = Field(
        None, description="Train first; only for a version with weights of a registered architecture and training rows."
    )


class GateCheck(Response):
    """One thing the gate looked at."""

    name: str = Field(
        description=(
            "`accuracy_drop`, `regression`, `min_accuracy`, `latency_p95`, `size`, `memory`; on devices also "
            "`against_fp32` and `provider`."
        )
    )
    value: float | None
    limit: float | None
    unit: str
    holds: bool
    detail: str


class GateVerdict(Response):
    """What the gate decided, and why."""

    passed: bool
    measured_on: str = Field(description="`server`, or the ids of the devices it was measured on.")
    checks: list[GateCheck]


class JobView(Response):
    """The building of a variant."""

    id: str
    state: str
    progress: float = Field(description="0 to 1.")
    step: str
    attempts: int = Field(description="How often it was begun.")


class VariantView(Response):
    """A version converted for a profile."""

    observed = frozenset({"job", "updated_at"})

    id: str
    model: str
    version: str
    profile: str
    state: VariantState
    runtime: str
    precision: str | None
    digest: str | None
    size: int | None
    measurements: dict[str, Any] | None = Field(description="`converters.job.Measurements` of what was chosen.")
    candidates: list[dict[str, Any]] = Field(description="Everything that was tried, with its measurements.")
    lineage: dict[str, Any] | None = Field(description="Source digests, passes with parameters, tool versions.")
    gate: GateVerdict | None
    proven: bool = Field(description="Whether the gate let it pass on a device of the profile, not on the server only.")
    failure: Failure | None
    job: JobView | None
    created_at: dt.datetime
    updated_at: dt.datetime
