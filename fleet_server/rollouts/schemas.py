"""HTTP shapes of rollouts and deployments."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from agent.protocol.messages import ProbationPolicy
from fleet_server.devices.delivery import Delivery
from fleet_server.schemas import Failure, Name, Request, Response, Waiting, example

DEFAULTS = ProbationPolicy()
WEEK_S = 7 * 86_400


class RolloutState(StrEnum):
    """Where a rollout is."""

    AWAITING_APPROVAL = "awaiting_approval"  # nothing is sent before others than its creator approved it
    RUNNING = "running"
    PAUSED = "paused"  # by a person, or by a stop rule with on_stop=pause
    REVERTING = "reverting"  # a stop rule or an abort takes devices back to what they ran before
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"  # ended without reverting, or after reverting: `verdicts` says which
    REVERTED = "reverted"


class StopMetric(StrEnum):
    """What a stop rule can look at, over the cohort of devices that have the new version."""

    FAILED_PERCENT = "failed_percent"  # deployments that failed or rolled back, of those sent
    ERROR_PERCENT = "error_percent"  # requests that failed inside the model, of those answered
    LATENCY_P95_MS = "latency_p95_ms"  # over all requests
    LATENCY_P95_RATIO = "latency_p95_ratio"  # against what the same devices ran before, per profile, the worst
    ACCURACY_DROP_POINTS = "accuracy_drop_points"  # labelled feedback, against the gate's measurement


class StopRule(Request):
    """Stop when a metric goes above a bound."""

    metric: StopMetric
    above: float = Field(ge=0)
    min_samples: int = Field(
        1, ge=1, description="Devices (failed_percent) or requests (the others) before it is judged."
    )


class Stage(Request):
    """One stage: the share of the target that has the version when it is done."""

    percent: float = Field(gt=0, le=100, description="Cumulative, of all devices of the rollout; rounded up.")
    soak_s: float = Field(0.0, ge=0, description="How long to watch after its devices settled, in seconds.")


class ProbationSpec(Request):
    """How each device watches the version when it begins to serve, and what makes it go back by itself."""

    seconds: float | None = Field(
        None, ge=0, le=WEEK_S, description="How long. Default: the server's (SHOAL_PROBATION_S)."
    )
    at_most_s: float | None = Field(
        None,
        ge=0,
        le=WEEK_S,
        description="How long to go on where fewer than `minimum_requests` came; then it stays, as not exercised. "
        "Default: not beyond `seconds`.",
    )
    minimum_requests: int = Field(
        DEFAULTS.minimum_requests, ge=0, le=1_000_000, description="Requests that a judgement needs."
    )
    error_percent: float = Field(
        100 * DEFAULTS.error_share, ge=0, le=100, description="Of its requests that may fail inside the model."
    )
    latency_p95_ratio: float = Field(
        DEFAULTS.latency_ratio,
        ge=0,
        le=1000,
        description="How many times the 95th percentile of the version before, on the same device; 0 is no bound.",
    )
    memory_mb: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="MiB that loading and running it may add to the agent. Default: the profile's memory budget and "
        "`growth_mb`, where it has one.",
    )
    growth_mb: float = Field(
        DEFAULTS.growth_mb, ge=0, le=1_000_000, description="MiB it may grow by without an end; 0 is no bound."
    )
    on_memory_short: Literal["refuse", "replace"] = Field(
        "refuse",
        description="Where two versions do not fit into memory: let the new one fail, or take the one before out "
        "first, and answer nothing until the new one is loaded.",
    )

    @model_validator(mode="after")
    def _fits(self) -> ProbationSpec:
        if self.at_most_s is not None and self.seconds is not None and self.at_most_s < self.seconds:
            raise ValueError("at_most_s: it must be at least `seconds`; leave it out to end the watching with those")
        if 0 < self.latency_p95_ratio < 1:
            raise ValueError("latency_p95_ratio: below 1 an equally fast version is taken back; give 0 for no bound")
        return self


class RolloutStrategy(Request):
    """How a rollout goes on and what stops it."""

    stages: list[Stage] = Field(
        default_factory=lambda: [Stage(percent=10, soak_s=60), Stage(percent=100)], min_length=1, max_length=20
    )
    stop_when: list[StopRule] = Field(
        default_factory=lambda: [
            StopRule(metric=StopMetric.FAILED_PERCENT, above=5),
            StopRule(metric=StopMetric.ERROR_PERCENT, above=1, min_samples=100),
        ],
        max_length=20,
    )
    on_stop: Literal["pause", "revert"] = Field("revert", description="What a stop rule does.")
    probation: ProbationSpec = Field(default_factory=ProbationSpec)

    @model_validator(mode="after")
    def _stages_grow_to_all(self) -> RolloutStrategy:
        percents = [stage.percent for stage in self.stages]
        if percents != sorted(set(percents)):
            raise ValueError("stages: each stage's percent must be larger than the one before")
        if percents[-1] != 100:
            raise ValueError("stages: the last stage's percent must be 100")
        return self


class RolloutTarget(Request):
    """Which devices: those that meet everything that is given. Nothing given is an error; say `all` if you mean it."""

    all: bool = False
    devices: list[str] = Field(default_factory=list, max_length=100_000)
    profiles: list[Name] = Field(default_factory=list)
    tags: dict[str, str] = Field(default_factory=dict)
    query: str | None = Field(
        None, min_length=1, max_length=4096, description="In RSQL, as for the list of devices: `site==plant7;arch==a*`."
    )

    @model_validator(mode="after")
    def _says_something(self) -> RolloutTarget:
        if not (self.all or self.devices or self.profiles or self.tags or self.query):
            raise ValueError("target: give devices, profiles, tags or a query, or all=true for the whole fleet")
        return self


class RolloutCreate(Request):
    """A new rollout; it starts at once, or once it is approved where its fleet asks for that."""

    model_config = example(
        version="mnist@2",
        name="new weights for plant 7",
        target={"tags": {"site": "plant7"}},
        strategy={
            "stages": [{"percent": 10, "soak_s": 600}, {"percent": 100}],
            "stop_when": [
                {"metric": "failed_percent", "above": 5},
                {"metric": "latency_p95_ratio", "above": 1.3, "min_samples": 200},
            ],
            "on_stop": "revert",
            "probation": {"seconds": 60, "at_most_s": 900, "minimum_requests": 50, "latency_p95_ratio": 1.5},
        },
    )

    version: str = Field(description="`model@version`.", pattern=r"^[^@\s]+@[^@\s]+$")
    name: str | None = Field(None, max_length=128)
    target: RolloutTarget
    strategy: RolloutStrategy = Field(default_factory=RolloutStrategy)
    delivery: Delivery | None = Field(
        None,
        description="How the artifact may come to devices, beside what their profiles say: the lower rate and all "
        "budgets hold; windows that are given here hold in place of the profile's.",
    )
    allow_unproven: bool = Field(
        False, description="Also roll out variants that no device of their profile has measured (see gate runs)."
    )
    on_busy: Literal["refuse", "supersede"] = Field(
        "refuse", description="What to do with devices that another running rollout of the model has not settled."
    )


class StageVerdict(Response):
    """One judgement of the server."""

    at: dt.datetime
    stage: int
    decision: str = Field(
        description="`wait`, `approve`, `reject`, `start`, `advance`, `succeed`, `pause`, `resume`, `stop`, `revert`, "
        "`abort`."
    )
    reason: str


class RolloutCounts(Response):
    """How many deployments are where."""

    total: int
    scheduled: int
    in_progress: int
    waiting: int = Field(description="Of those in progress: that stand still on purpose.")
    active: int
    failed: int
    superseded: int


class Terms(Request):
    """What a rollout that waits was created with: it starts by this, or not at all.

    `artifacts` are the digests, by profile, that were to be sent: others were not approved.
    """

    on_busy: Literal["refuse", "supersede"] = "refuse"
    allow_unproven: bool = False
    artifacts: dict[str, str | None] = Field(default_factory=dict)


class Approval(Response):
    """Somebody's approval of a rollout."""

    by: str
    id: str = Field(description="Of the principal: it approves once.")
    at: dt.datetime
    comment: str


class RolloutDecision(Request):
    """To approve or reject a rollout."""

    model_config = example(comment="measured on line 3 since Monday")

    comment: str = Field("", max_length=1000, description="Why; kept with the rollout and in the audit log.")


class RolloutView(Response):
    """A rollout."""

    observed = frozenset({"counts"})

    id: str
    name: str
    model: str
    version: str
    state: RolloutState
    stage: int = Field(description="Index of the stage it is in, from 0.")
    stages: int
    target: RolloutTarget
    strategy: RolloutStrategy
    delivery: Delivery | None
    counts: RolloutCounts
    verdicts: list[StageVerdict]
    created_by: str
    approvals_needed: int = Field(description="How many others than its creator must approve it before it starts.")
    approvals: list[Approval]
    created_at: dt.datetime
    finished_at: dt.datetime | None


class RolloutAbort(Request):
    """How to end a rollout."""

    model_config = example(revert=True)

    revert: bool = Field(False, description="Also take devices back to what they ran before.")


class ProbationView(Response):
    """What a device saw of the version while it watched it: what its judgement rests on."""

    watched_s: float
    requests: int
    errors: int
    rejected: int = Field(description="Refused before the model saw them.")
    latency_p95_ms: float | None
    before_p95_ms: float | None = Field(description="Of the last requests of the version before, on this device.")
    memory_mb: float | None = Field(description="MiB the agent's worker grew by since before it was loaded.")
    provider: str = Field(description="Execution provider that ran it.")
    exercised: bool = Field(description="Whether it had as many requests as a judgement needs.")
    note: str


class DeploymentView(Response):
    """One device's part in a rollout."""

    id: str
    rollout_id: str
    device_id: str
    model: str
    version: str
    variant_id: str
    profile: str
    stage: int
    phase: str = Field(description="`scheduled`, or a phase of the device's own state machine.")
    desired: bool
    failure: Failure | None
    probation: ProbationView | None
    waiting: Waiting | None
    artifact_bytes: int
    encoding: str = Field(
        description="Codec of the encoding that the artifact came by, such as `delta-1`; empty when it came as it is."
    )
    received_bytes: int = Field(description="Bytes that came to the device over a network for it, repeats counted.")
    sources: dict[str, int] = Field(
        description="Bytes by the source that brought them.", examples=[{"mqtt": 262144, "https": 1048576}]
    )
    deploy_s: float | None = Field(description="From being sent until the device served it, in seconds.")
    created_at: dt.datetime
    sent_at: dt.datetime | None
    settled_at: dt.datetime | None


class BundleCreate(Request):
    """What devices without a server are to run."""

    model_config = example(versions=["mnist@2"], profiles=["rpi5-litert"], name="line-a")

    versions: list[str] = Field(min_length=1, max_length=64, description="`model@version`, one a model.")
    profiles: list[Name] = Field(
        [], max_length=64, description="For these profiles; for all that have a variant when empty."
    )
    name: Name = Field("default", description="Of the order: a device follows the one that its configuration names.")
    probation_s: float | None = Field(
        None, ge=0, le=86_400, description="How long devices watch it, in seconds; as in rollouts when absent."
    )
    allow_unproven: bool = Field(False, description="Also variants that no device has measured.")


class BundleFile(Response):
    """A file of TUF metadata."""

    file: str = Field(examples=["7.model.mnist.json"])
    body: str = Field(description="The very bytes that were signed.")


class BundleArtifact(Response):
    """An artifact: `GET /artifacts/{digest}` has its bytes."""

    digest: str
    size: int


class BundleView(Response):
    """A signed order, and what a device needs to judge it and to carry it out."""

    name: str
    serial: int = Field(description="Grows with every change of the order.")
    fleet: str
    signed: bool = Field(description="False while the order waits for signatures: then `metadata` is empty.")
    order: str = Field(description="Its JSON, exactly as it is signed.")
    manifests: list[str] = Field(description="Each as JSON, exactly as it is signed.")
    metadata: list[BundleFile]
    artifacts: list[BundleArtifact]
