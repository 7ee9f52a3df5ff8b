"""HTTP shapes of devices and profiles."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import OLD_LITERT, OLD_LITERT_PRECISIONS, RUNTIME_NAME, Precision, RuntimeName
from fleet_server.devices.delivery import Delivery
from fleet_server.schemas import Name, Request, Response, Waiting, example

Scalar = str | int | float | bool


class AtLeast(Request):
    """A number that a fact must reach."""

    min: float = Field(description="The fact must be a number and at least this.")


class Budgets(Request):
    """What a variant may cost; null is no bound."""

    accuracy_drop_points: float | None = Field(
        1.0, ge=0, le=100, description="Accuracy it may lose against the source model, in percentage points."
    )
    latency_p95_ms: float | None = Field(None, gt=0, description="95th percentile of one inference, in ms.")
    size_mb: float | None = Field(None, gt=0, description="Artifact size in MB (1,000,000 bytes).")
    memory_mb: float | None = Field(None, gt=0, description="Memory the loaded variant adds to its process, in MiB.")


class SchedulingSpec(Request):
    """How a device answers the requests for a model."""

    queue_limit: int = Field(
        1024, ge=1, le=LIMITS.waiting_requests, description="Requests that may wait; more are refused (429)."
    )
    latency_target_ms: float = Field(
        0.0,
        ge=0,
        le=LIMITS.scheduling_ms,
        description="How long a request ought to take at most: no batch is made that takes longer. 0: no bound.",
    )
    batch_wait_ms: float = Field(
        0.0,
        ge=0,
        le=LIMITS.scheduling_ms,
        description="How long a request may wait for others to be answered with; 0: it never waits for company.",
    )
    cores: list[Annotated[int, Field(ge=0, lt=LIMITS.cores)]] = Field(
        default_factory=list,
        max_length=LIMITS.cores,
        description="Processors that run it, by number; those that a device does not have are left out; none: all.",
    )
    gpu_memory_mb: int = Field(
        0,
        ge=0,
        le=LIMITS.gpu_memory_mb,
        description=(
            "What it may take of a GPU's memory, in MiB: of CUDA's arena, or of TensorRT's workspace. 0: no bound."
        ),
    )


def _runtime_name(value: str) -> str:
    if not RUNTIME_NAME.match(value):
        raise ValueError(
            f"{value[:80]!r} is no runtime's name: 'onnx', 'litert', 'torch', or of a package's runtime its entry "
            "point, of lower-case letters, digits, '.', '_' and '-'"
        )
    return value


class ProfileSpec(Request):
    """A named kind of device: which devices, which runtime, which precisions, which budgets."""

    match: dict[str, Scalar | list[Scalar] | AtLeast] = Field(
        default_factory=dict,
        description=(
            "Facts by dotted path, all of which must hold: a value (equal, or contained where the fact is a list), "
            'a list of values (any of them), or {"min": number}. Examples: {"arch": "aarch64", '
            '"cpu_features": "asimddp", "memory_mb": {"min": 2048}, "tags.site": ["plant7", "plant8"], '
            '"runtimes.litert.version": "2.3.0", "accelerators.kind": "cuda"}.'
        ),
    )
    runtime: Annotated[str, AfterValidator(_runtime_name)] = Field(
        json_schema_extra={"pattern": "^" + RUNTIME_NAME.pattern.replace(r"\Z", "$")},
        description="The runtime that loads the variant on the device: `onnx`, `litert`, `torch`, or one that a "
        "package brings there, which gets the source form as it is.",
        examples=["onnx"],
    )
    providers: list[str] = Field(
        default_factory=lambda: ["cpu"],
        description="Execution providers to try, in order; the first that proves itself by an inference runs.",
    )
    provider_options: dict[Name, dict[Name, Annotated[str, Field(max_length=1024)]]] = Field(
        default_factory=dict,
        description=(
            "What ONNX Runtime takes as options of an execution provider, by its name here, such as "
            '{"tensorrt": {"trt_engine_cache_enable": "1"}, "openvino": {"device_type": "NPU"}}. TensorRT is allowed '
            "fp16 or int8 by itself where the variant is of that precision."
        ),
    )
    precisions: list[Precision] = Field(
        default_factory=lambda: [Precision.FP32, Precision.INT8],
        min_length=1,
        description="Numeric recipes to try; measurement decides among those within the budgets.",
    )
    budgets: Budgets = Field(default_factory=Budgets)
    objective: Literal["latency", "size", "accuracy"] = Field(
        "latency", description="What decides among candidates within the budgets."
    )
    threads: int = Field(1, ge=1, le=256, description="Intra-op threads of the runtime.")
    max_batch: int = Field(32, ge=1, le=1024, description="Largest batch worth making of waiting requests.")
    scheduling: SchedulingSpec = Field(
        default_factory=SchedulingSpec, description="How its devices answer the requests for a model."
    )
    resources: dict[Name, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description=(
            'What a Dask worker must have to build for it, such as {"GPU": 1, "compute_capability_8.7": 1}; null '
            "takes a GPU where a provider is cuda or tensorrt, and for tensorrt one of the capability in `match`."
        ),
    )

    @model_validator(mode="after")
    def _options_have_providers(self) -> Self:
        for name in self.provider_options:
            if name not in self.providers:
                raise ValueError(
                    f"provider_options: {name!r} is not one of the providers {self.providers}: add it there"
                )
        return self

    @model_validator(mode="after")
    def _another_runtime_gets_what_there_is(self) -> Self:
        if Precision.FP32 in self.precisions:
            return self
        if self.runtime not in set(RuntimeName):
            raise ValueError(f"precisions: {self.runtime} comes from a package, and gets the source form: add fp32")
        if self.runtime == RuntimeName.TORCH:
            raise ValueError("precisions: torch gets programs in the precision of their weights: add fp32")
        return self

    @model_validator(mode="after")
    def _old_litert_runs_what_it_can(self) -> Self:
        wrong = [one.value for one in self.precisions if one not in OLD_LITERT_PRECISIONS]
        if self.runtime == RuntimeName.LITERT and self.match.get("runtimes.litert.package") == OLD_LITERT and wrong:
            raise ValueError(
                f"precisions: {OLD_LITERT} runs {', '.join(wrong)} wrongly or crashes: fp32 and int8 are right on it"
            )
        return self


class ProfileCreate(ProfileSpec):
    """A new profile."""

    model_config = example(
        name="rpi5-litert",
        match={"arch": "aarch64", "cpu_features": "asimddp", "memory_mb": {"min": 2048}},
        runtime="litert",
        precisions=["fp32", "int8"],
        budgets={"accuracy_drop_points": 0.5, "latency_p95_ms": 20},
    )

    name: Name
    delivery: Delivery | None = Field(None, description="How artifacts may come to its devices.")
    allow_unknown_runtime: bool = Field(
        False,
        description="Take a runtime that comes with no agent, and that no device of the fleet has reported: one that a "
        "package brings to devices that are yet to come. Else it is refused, for it may be misspelt.",
    )


class ProfileUpdate(Request):
    """What may be changed of a profile. Its devices are told at once."""

    model_config = example(delivery={"budgets": {"cellular": "50 MB per day"}, "download": ["22:00-04:00"]})

    delivery: Delivery | None = Field(description="How artifacts may come to its devices; null: as they like.")


class ProfileView(Response):
    """A profile."""

    observed = frozenset({"devices"})

    id: str
    name: str
    spec: ProfileSpec
    delivery: Delivery | None
    devices: int | None = Field(None, description="Devices that have it; only when one profile is shown.")
    created_at: dt.datetime


class ServingView(Response):
    """One model that answers requests on a device now."""

    model: str
    version: str
    digest: str
    deployment_id: str
    runtime: str
    provider: str
    load_s: float
    fell_back: str = Field(
        "", description="Why another execution provider runs it than the profile wants first; empty when that one does."
    )


class ProblemView(Response):
    """Something that went wrong on a device itself, and that it lived through."""

    code: str = Field(description="Stable, such as `disk_full`, `journal_lost`, `worker_ended`: docs/operations.md.")
    detail: str
    first_at: dt.datetime = Field(description="By the device's clock, as is `last_at`.")
    last_at: dt.datetime
    count: int
    ongoing: bool = Field(description="It holds still, as far as the device has said.")


class DeploymentWaiting(Response):
    """A deployment that stands still on its device, on purpose."""

    model: str
    version: str
    waiting: Waiting


class HoldView(Response):
    """That a device is held back."""

    by: str
    at: dt.datetime
    reason: str


class DeviceView(Response):
    """A device."""

    observed = frozenset(
        {"online", "last_seen_at", "facts", "serving", "problems", "waiting", "desired_revision", "reported_revision"}
    )

    id: str
    profile: str | None = Field(description="Name of the profile it matches or is pinned to; null when none matches.")
    profile_pinned: bool
    online: bool
    last_seen_at: dt.datetime | None
    tags: dict[str, str] = Field(description="The device's own tags, overlaid by those people gave it here.")
    facts: dict[str, Any] = Field(description="What the agent measured: `agent.protocol.facts.DeviceFacts`.")
    serving: list[ServingView]
    problems: list[ProblemView] = Field(description="The newest of those that it told of, the newest last.")
    waiting: list[DeploymentWaiting] = Field(description="What stands still on it on purpose, and until when.")
    hold: HoldView | None = Field(description="Who holds it back and why: no rollout sends it anything; null: nobody.")
    desired_revision: int
    reported_revision: int
    created_at: dt.datetime


class HoldRequest(Request):
    """To hold a device back."""

    model_config = example(reason="under repair until Friday")

    reason: str = Field(min_length=1, max_length=500, description="Why; shown wherever something waits for it.")


class DeviceUpdate(Request):
    """What people may change of a device. A field that is absent stays as it is."""

    model_config = example(tags={"site": "plant7", "line": "3"})

    tags: dict[Name, str] | None = Field(None, description="Replaces the tags people gave it.")
    profile: Name | None = Field(None, description="Pins the device to a profile; null lets it match again.")
