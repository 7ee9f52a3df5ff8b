"""How a rollout goes on and what stops it, as people write it: checked when read, and never changed after."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from agent.protocol.messages import ProbationPolicy
from fleet_server.schemas import Name, Request

DEFAULTS = ProbationPolicy()
WEEK_S = 7 * 86_400
CONFIDENCE = 0.95


class StopMetric(StrEnum):
    """What a stop rule can look at, over the cohort of devices that have the new version."""

    # Counted: of the deployments that were sent and settled.
    FAILED_PERCENT = "failed_percent"  # failed, or rolled back by their device
    INSTALL_FAILED_PERCENT = "install_failed_percent"  # never came to serve
    ROLLED_BACK_PERCENT = "rolled_back_percent"  # taken back by their device: crashes, probation
    FELL_BACK_PERCENT = "fell_back_percent"  # settled, and run by another execution provider than the first wanted
    # Shares: of a device's requests.
    ERROR_PERCENT = "error_percent"  # of requests that failed inside the model
    ACCURACY_DROP_POINTS = "accuracy_drop_points"  # labelled feedback, against the gate's measurement
    CRASHED_WINDOWS_PERCENT = "crashed_windows_percent"  # of telemetry windows in which the worker died or hung
    DISAGREEMENT_PERCENT = "disagreement_percent"  # of a shadow's answers, with those of the version that serves
    # Sampled: a device's requests, in blocks of `min_samples`.
    ERROR_RISE_POINTS = "error_rise_points"  # of the same, more than the device had before
    LATENCY_P95_MS = "latency_p95_ms"
    LATENCY_P50_RATIO = "latency_p50_ratio"  # of what the same device had before
    LATENCY_P95_RATIO = "latency_p95_ratio"
    LATENCY_P99_RATIO = "latency_p99_ratio"
    THROUGHPUT_DROP_PERCENT = "throughput_drop_percent"  # fewer requests a second than the device answered before
    MEMORY_RISE_MB = "memory_rise_mb"  # of the agent, more than before
    TEMPERATURE_C = "temperature_c"
    TEMPERATURE_RISE_C = "temperature_rise_c"
    CONFIDENCE_DROP_POINTS = "confidence_drop_points"  # of a classifier's mean confidence, from 0 to 100
    CONFIDENCE_SHIFT = "confidence_shift"  # Kolmogorov-Smirnov distance of the confidences, 0 to 1
    OUTPUT_DRIFT = "output_drift"  # PSI of the answers: of the classes predicted, or of the numbers
    INPUT_DRIFT = "input_drift"  # the largest PSI of an input's means and deviations

    @property
    def counted(self) -> bool:
        """Whether it counts deployments; else it samples what devices measure."""
        return self in _COUNTED

    @property
    def share(self) -> bool:
        """Whether it is a share of requests, each of which counts by itself."""
        return self in _SHARES

    @property
    def relative(self) -> bool:
        """Whether it compares a device with what it did before."""
        return self in _RELATIVE


_COUNTED = {
    StopMetric.FAILED_PERCENT,
    StopMetric.INSTALL_FAILED_PERCENT,
    StopMetric.ROLLED_BACK_PERCENT,
    StopMetric.FELL_BACK_PERCENT,
}
_SHARES = {
    StopMetric.ERROR_PERCENT,
    StopMetric.ACCURACY_DROP_POINTS,
    StopMetric.CRASHED_WINDOWS_PERCENT,
    StopMetric.DISAGREEMENT_PERCENT,
}
_RELATIVE = {
    StopMetric.ERROR_RISE_POINTS,
    StopMetric.LATENCY_P50_RATIO,
    StopMetric.LATENCY_P95_RATIO,
    StopMetric.LATENCY_P99_RATIO,
    StopMetric.THROUGHPUT_DROP_PERCENT,
    StopMetric.MEMORY_RISE_MB,
    StopMetric.TEMPERATURE_RISE_C,
    StopMetric.CONFIDENCE_DROP_POINTS,
    StopMetric.CONFIDENCE_SHIFT,
    StopMetric.OUTPUT_DRIFT,
    StopMetric.INPUT_DRIFT,
}


class StopRule(Request):
    """Stop when a metric goes above a bound."""

    metric: StopMetric
    above: float = Field(ge=0)
    min_samples: int = Field(
        1,
        ge=1,
        description="Deployments, or requests (of accuracy_drop_points labelled rows), before it is judged. Of metrics "
        "that are no shares: requests of one device that make one block, which is compared with the bound.",
    )
    confidence: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="How sure it must be, however often it looks: by a sequential test over devices. 0 stops as soon "
        "as the cohort's value is above the bound. Default: 0.95 for what is sampled, 0 for what is counted.",
    )
    against: Literal["past", "control"] = Field(
        "past",
        description="Of metrics that compare: the device's own past hour, or that less what changed meanwhile on "
        "devices of its profile that do not have the version yet.",
    )

    @property
    def sure(self) -> float:
        """The confidence that holds."""
        if self.confidence is not None:
            return self.confidence
        return 0.0 if self.metric.counted else CONFIDENCE

    @model_validator(mode="after")
    def _can_be_judged(self) -> StopRule:
        if self.against == "control" and not self.metric.relative:
            raise ValueError(f"against: {self.metric.value} compares with nothing; leave `against` out")
        if self.metric.counted and self.sure and not 0 < self.above < 100:
            raise ValueError("above: with a confidence it must be more than 0 and less than 100 %")
        return self


class Stage(Request):
    """One stage: how much of the target has the version when it is done."""

    percent: float | None = Field(
        None, gt=0, le=100, description="Cumulative, of all devices of the rollout; rounded up."
    )
    count: int | None = Field(None, gt=0, description="Cumulative, in devices; instead of `percent`.")
    soak_s: float = Field(0.0, ge=0, description="How long to watch after its devices settled, in seconds.")
    approval: bool = Field(
        False, description="Whether somebody must let it begin (`shoal rollout promote`) when the one before is done."
    )

    @model_validator(mode="after")
    def _says_how_much(self) -> Stage:
        if (self.percent is None) == (self.count is None):
            raise ValueError("percent: give either `percent` or `count`")
        return self


class Order(Request):
    """In which order devices come; those that are equal by it, and all by default, in a random one that never changes.

    The random order is by a hash of rollout name and device id, and kinds of device take turns in it, so that the
    first stage has as many profiles as it has room for.
    """

    tag: str | None = Field(None, max_length=128, description="Devices whose value of this tag is named come first.")
    first: list[str] = Field(default_factory=list, max_length=100, description="Values of the tag, in their order.")

    @model_validator(mode="after")
    def _says_which(self) -> Order:
        if bool(self.tag) != bool(self.first):
            raise ValueError("first: name the tag and the values of it that come first, in their order")
        return self


class Rate(Request):
    """How many devices are sent the version in a minute."""

    per_minute: float = Field(gt=0, le=1_000_000)
    growth: float = Field(1.0, ge=1, le=100, description="By how much the rate is multiplied; 1 leaves it constant.")
    after_active: int = Field(
        10, ge=1, description="It is multiplied each time so many more devices run the version well."
    )
    at_most_per_minute: float = Field(1_000_000, gt=0, le=1_000_000)

    @model_validator(mode="after")
    def _grows(self) -> Rate:
        if self.at_most_per_minute < self.per_minute:
            raise ValueError("at_most_per_minute: it must be at least `per_minute`")
        return self


class Caps(Request):
    """How many devices may be under way at once: sent and not settled."""

    at_once: int | None = Field(None, ge=1, description="Of all.")
    tag: str | None = Field(None, max_length=128, description="A tag; devices that share its value share a cap.")
    per_value: int | None = Field(None, ge=1, description="Of those that share a value of the tag.")

    @model_validator(mode="after")
    def _names_both(self) -> Caps:
        if (self.tag is None) != (self.per_value is None):
            raise ValueError("per_value: give the tag and how many of one value of it may be under way at once")
        return self


class Retry(Request):
    """Whether a device whose deployment failed is sent it again. One that took it back by itself never is."""

    attempts: int = Field(0, ge=0, le=10, description="Times more.")
    wait_s: float = Field(300.0, ge=0, le=WEEK_S, description="After it failed; doubled each time.")


class ExposureSpec(Request):
    """To let each device run the version beside the one that serves, before it takes its place."""

    mode: Literal["shadow", "split"] = Field(
        description="`shadow`: it is given copies of requests, and its answers are compared, not served. `split`: it "
        "answers a share of the requests."
    )
    share: float = Field(gt=0, le=1, description="Of the model's requests.")
    for_s: float = Field(gt=0, le=WEEK_S, description="How long on each device, in seconds; then it serves in full.")


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
    on_provider_missing: Literal["fall_back", "refuse", "keep_old"] = Field(
        "fall_back",
        description="Where the execution provider that the profile wants first can't run it, as a first inference on "
        "the device shows: let the next one or the CPU run it and say so; let it fail (`provider_unavailable`); or let "
        "it fail where something serves the model already, and else fall back. What runs already always falls back.",
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
    order: Order = Field(default_factory=Order)
    rate: Rate | None = Field(None, description="Default: a stage's devices are all sent it at once.")
    caps: Caps = Field(default_factory=Caps)
    retry: Retry = Field(default_factory=Retry)
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="Seconds since it began, or was resumed, after which it pauses for somebody to look at it.",
    )
    stop_when: list[StopRule] = Field(
        default_factory=lambda: [
            StopRule(metric=StopMetric.FAILED_PERCENT, above=5),
            StopRule(metric=StopMetric.ERROR_PERCENT, above=1, min_samples=100),
        ],
        max_length=20,
    )
    on_stop: Literal["pause", "revert"] = Field("revert", description="What a stop rule does.")
    revert_per_minute: float | None = Field(
        None, gt=0, le=1_000_000, description="Devices that are taken back in a minute. Default: all at once."
    )
    exposure: ExposureSpec | None = Field(
        None,
        description="Devices that serve nothing yet, or whose agent does not know it, let it serve in full at once.",
    )
    probation: ProbationSpec = Field(default_factory=ProbationSpec)

    @model_validator(mode="after")
    def _stages_grow_to_all(self) -> RolloutStrategy:
        for unit in ("percent", "count"):
            given = [value for stage in self.stages if (value := getattr(stage, unit)) is not None]
            if given != sorted(set(given)):
                raise ValueError(f"stages: each stage's {unit} must be larger than the one before")
        if self.stages[-1].percent != 100:
            raise ValueError("stages: the last stage's percent must be 100")
        if self.stages[0].approval:
            raise ValueError("stages: the first one begins with the rollout; `approval` belongs to later ones")
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
    late: bool = Field(
        True,
        description="Whether devices that come to meet this later join: at the stage that is open, never past it.",
    )

    @model_validator(mode="after")
    def _says_something(self) -> RolloutTarget:
        if not (self.all or self.devices or self.profiles or self.tags or self.query):
            raise ValueError("target: give devices, profiles, tags or a query, or all=true for the whole fleet")
        return self
