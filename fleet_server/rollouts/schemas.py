"""HTTP shapes of rollouts and deployments."""

from __future__ import annotations

import datetime as dt
from typing import Literal

from pydantic import Field

from agent.protocol.release import AGENT
from fleet_server.devices.delivery import Delivery
from fleet_server.domain.states import RolloutState
from fleet_server.domain.strategy import RolloutStrategy, RolloutTarget
from fleet_server.errors import InvalidError
from fleet_server.schemas import Failure, Name, Request, Response, Waiting, example


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

    version: str = Field(
        description="`model@version`; `shoal-agent@version` for a release of the agent.", pattern=r"^[^@\s]+@[^@\s]+$"
    )
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

    @property
    def of_agent(self) -> bool:
        """Whether it is a release of the agent that is rolled out."""
        return self.version.startswith(f"{AGENT}@")

    def fitting(self) -> RolloutCreate:
        """This; of a release without the default rules that sample requests, for it has none of its own.

        Raises:
            InvalidError: where such a rule, or exposure, is asked for.
        """
        if not self.of_agent:
            return self
        sampled = [rule.metric.value for rule in self.strategy.stop_when if not rule.metric.counted]
        if sampled and "stop_when" in self.strategy.model_fields_set:
            detail = (
                f"strategy.stop_when: {sampled[0]} is of a model's requests, which a release of the agent has none of"
            )
            raise InvalidError("no_release_metric", f"{detail}: use failed_percent", field="strategy.stop_when")
        if self.strategy.exposure is not None:
            detail = "strategy.exposure: two agents do not run beside each other: leave it out"
            raise InvalidError("no_release_exposure", detail, field="strategy.exposure")
        counted = [rule for rule in self.strategy.stop_when if rule.metric.counted]
        return self.model_copy(update={"strategy": self.strategy.model_copy(update={"stop_when": counted})})


class StageVerdict(Response):
    """One judgement of the server."""

    at: dt.datetime
    stage: int
    decision: str = Field(
        description="`wait`, `approve`, `reject`, `start`, `join`, `prepare`, `advance`, `promote`, `retry`, "
        "`succeed`, `pause`, `resume`, `stop`, `revert`, `reverted`, `abort`."
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


class PinRequest(Request):
    """To pin a device to a version."""

    model_config = example(version="mnist@2", reason="compared with the old scale until May")

    version: str = Field(description="`model@version`.", pattern=r"^[^@\s]+@[^@\s]+$")
    reason: str = Field(min_length=1, max_length=500, description="Why; shown wherever something waits for it.")
    allow_unproven: bool = Field(False, description="Also a variant that no device of its profile has measured.")


class RolloutPromote(Request):
    """How to go on."""

    model_config = example(full=False)

    full: bool = Field(False, description="All stages at once, unwatched.")


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


class RuleStanding(Response):
    """Where a stop rule stands."""

    metric: str
    above: float
    against: str
    confidence: float = Field(description="0 stops as soon as the value is above the bound.")
    value: float | None = Field(description="Over the cohort; null while nothing is known.")
    samples: int
    devices: int = Field(description="That had any.")
    evidence: float = Field(description="How many times likelier the samples are if the version is worse: an e-value.")
    needed: float = Field(description="The evidence that stops.")
    profile: str = Field(description="That stands out; empty when none does.")
    stops: bool
    reason: str


class Figure(Response):
    """A figure, and the interval it lies in with 95 % confidence."""

    value: float
    low: float
    high: float


class ComparedFigure(Response):
    """One figure of the cohort and of the version before; null where there is nothing to tell."""

    name: str = Field(examples=["latency_p95_ms"])
    now: Figure | None
    before: Figure | None


class CohortComparison(Response):
    """The devices of one profile that were sent the version."""

    profile: str
    devices: int = Field(description="Whose telemetry is in it: the first 200 of the rollout at most.")
    requests: int
    requests_before: int
    figures: list[ComparedFigure]


class RolloutComparison(Response):
    """What devices did with a rollout's version, and with the one before."""

    id: str
    cohorts: list[CohortComparison]
    until: dt.datetime


class HeldDevice(Response):
    """A device of a rollout that is held back."""

    device_id: str
    reason: str


class RolloutExplanation(Response):
    """What a rollout does now and why."""

    id: str
    state: RolloutState
    stage: int
    stages: int
    now: str = Field(description="What it does or waits for, in a sentence.")
    rules: list[RuleStanding]
    held: list[HeldDevice]
    verdicts: list[StageVerdict] = Field(description="Every decision so far, with its reason.")


class PreviewProfile(Response):
    """What devices of one profile would get."""

    profile: str
    devices: int
    version: str
    digest: str | None
    artifact_bytes: int
    proven: bool = Field(description="Whether a device of the profile has measured the variant.")


class PreviewStage(Response):
    """What one stage would reach."""

    stage: int
    devices: int
    profiles: dict[str, int] = Field(description="Devices by profile.")
    first: list[str] = Field(description="The first devices of it, in their order; twenty at most.")
    at_least_s: float = Field(description="Seconds that rate and soak take, without download and probation.")
    approval: bool


class PreviewLink(Response):
    """What would come over one kind of link."""

    link: str
    devices: int
    metered: int = Field(description="Of those, devices whose link costs by the byte.")
    bytes: int = Field(description="At most: differences and peers make it less.")


class PreviewProblem(Response):
    """What is in the way, or would be left out."""

    code: str
    detail: str
    devices: list[str] = Field(description="Five hundred at most.")
    blocks: bool = Field(description="Whether the rollout would be refused.")


class RolloutPreview(Response):
    """What a rollout would do."""

    model: str
    version: str
    devices: int
    profiles: list[PreviewProfile]
    stages: list[PreviewStage]
    links: list[PreviewLink]
    broadcast_bytes: int = Field(description="That the server would send at least: each artifact once a stage.")
    at_least_s: float = Field(description="Seconds that all stages take, without downloads and probation.")
    approvals_needed: int
    problems: list[PreviewProblem]
    starts: bool = Field(description="Whether it could be created now.")


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
    attempt: int = Field(description="0, and one more each time that it was tried again.")
    phase: str = Field(description="`scheduled`, or a phase of the device's own state machine.")
    desired: bool
    failure: Failure | None
    probation: ProbationView | None
    loading_s: float = Field(
        description="How long its device has been loading it, in seconds, where that takes long: an accelerator's "
        "compiler may take minutes, and what served goes on; else 0."
    )
    fell_back: str = Field(
        description="Why another execution provider runs it than the profile wants first; empty when that one does."
    )
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
