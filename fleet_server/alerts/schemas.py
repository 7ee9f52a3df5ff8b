"""HTTP shapes of alert rules, alerts, routes and silences."""

from __future__ import annotations

import datetime as dt
import re
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from fleet_server.domain.alerting import KINDS, AlertState, Bounds, Metric, Of, Patience, Severity
from fleet_server.domain.notifying import Timing
from fleet_server.schemas import Name, Request, Response, example

DAY_S = 86_400.0
MAIL = re.compile(r"^[A-Za-z0-9.!#$%&*+/=?^_{|}~-]{1,64}@[A-Za-z0-9.-]{1,190}\Z")
Query = Annotated[str, Field(min_length=1, max_length=4096, description="Devices it holds for, in RSQL.")]
Description = Annotated[str, Field(max_length=500)]
Comment = Annotated[str, Field(max_length=500)]
Seconds = Annotated[float, Field(ge=0, le=30 * DAY_S)]


class RuleSpec(Request):
    """What is looked at, of which subjects, and when it is bad."""

    metric: Metric = Field(description="What is looked at; docs/operations.md lists them.")
    threshold: float | None = Field(
        None, description="Bad beyond this; below it where low values are bad. Not of offline, fell_back, rolled_back."
    )
    clear: float | None = Field(
        None, description="Well again on the other side of this, so that what hovers does not flap; null: of threshold."
    )
    below: bool | None = Field(None, description="Whether low values are bad; null: as it is with the metric.")
    window_s: float | None = Field(
        None, ge=10, le=7 * DAY_S, description="Seconds of telemetry that count; null: as it is with the metric."
    )
    for_s: Seconds = Field(0.0, description="How long it must be bad before the alert fires, in seconds.")
    keep_s: Seconds = Field(0.0, description="How long it must be well before the alert resolves, in seconds.")
    least_requests: int = Field(
        20, ge=1, le=10**9, description="Of fewer requests (labelled rows, of accuracy) in the window nothing is said."
    )
    severity: Severity = Severity.WARNING
    query: Query | None = Field(None, description="Only devices it holds for, in RSQL; null: all of the fleet.")
    model: Name | None = Field(None, description="Only this model; null: every one.")
    enabled: bool = True
    description: Description = Field("", description="What it means and what to do; told with the alert.")

    @model_validator(mode="after")
    def _fits_its_metric(self) -> Self:
        kind = KINDS[self.metric]
        if kind.counted and self.threshold is None:
            raise ValueError(f"threshold: {self.metric.value} is compared with one: give it, in {kind.unit}")
        if not kind.counted and (self.threshold, self.clear, self.below) != (None, None, None):
            raise ValueError(f"threshold, clear, below: {self.metric.value} holds or does not: leave them out")
        if self.window_s is not None and not kind.window_s:
            raise ValueError(f"window_s: {self.metric.value} is what was said last: leave it out")
        if self.model is not None and kind.of is Of.DEVICE:
            raise ValueError(f"model: {self.metric.value} is of devices: leave it out")
        if self.query is not None and kind.of is Of.ROLLOUT:
            raise ValueError(f"query: {self.metric.value} is of rollouts: leave it out")
        if self.clear is not None and self.threshold is not None:
            wrong = self.clear < self.threshold if self.low else self.clear > self.threshold
            if wrong:
                raise ValueError("clear: it lies on the bad side of threshold: give one on the good side")
        return self

    @property
    def low(self) -> bool:
        """Whether low values are bad."""
        return KINDS[self.metric].below if self.below is None else self.below

    @property
    def bounds(self) -> Bounds | None:
        """What values are compared with; None where the rule holds wherever there is one."""
        return None if self.threshold is None else Bounds(self.threshold, self.clear, self.low)

    @property
    def patience(self) -> Patience:
        """How long."""
        return Patience(self.for_s, self.keep_s)

    @property
    def seconds(self) -> float:
        """Seconds of telemetry that count."""
        return KINDS[self.metric].window_s if self.window_s is None else self.window_s


class RuleCreate(RuleSpec):
    """A new rule."""

    model_config = example(
        name="slow-cameras", metric="latency_p95_ms", threshold=50, clear=40, for_s=300, query="site==plant7",
        severity="critical",
    )  # fmt: skip

    name: Name


class RuleUpdate(Request):
    """What to change of a rule; absent fields stay as they are. Its metric stays: make another rule for another."""

    model_config = example(threshold=80, enabled=True)

    threshold: float | None = None
    clear: float | None = None
    below: bool | None = None
    window_s: float | None = Field(None, ge=10, le=7 * DAY_S)
    for_s: Seconds | None = None
    keep_s: Seconds | None = None
    least_requests: int | None = Field(None, ge=1, le=10**9)
    severity: Severity | None = None
    query: Query | None = None
    model: Name | None = None
    enabled: bool | None = None
    description: Description | None = None


class RuleView(Response):
    """An alert rule."""

    observed = frozenset({"firing", "problem"})

    id: str
    name: str
    metric: Metric
    unit: str = Field(description="Of threshold, clear, and values.")
    threshold: float | None
    clear: float | None
    below: bool
    window_s: float = Field(description="0: what was said last.")
    for_s: float
    keep_s: float
    least_requests: int
    severity: Severity
    query: str | None
    model: str | None
    enabled: bool
    description: str
    shipped: bool = Field(description="It came with Shoal; changed or deleted, it stays so.")
    problem: str = Field(description="Why it can't be looked at; empty when it can.")
    created_by: str
    created_at: dt.datetime
    firing: int | None = Field(None, description="Alerts of it that fire; only when one rule is shown.")


class AlertView(Response):
    """A rule that holds, or held, for one subject."""

    observed = frozenset({"clearing_since", "value", "detail", "silenced"})

    id: str
    rule: str = Field(description="The rule's name.")
    metric: Metric
    severity: Severity
    subject: str = Field(description="`device/ID`, `device/ID/model/NAME` or `rollout/ID`.")
    device_id: str | None
    model: str | None
    rollout_id: str | None
    state: AlertState
    value: float | None = Field(description="When it began, and, once it fires, when it began to.")
    detail: str
    since: dt.datetime = Field(description="When the condition was first seen to hold.")
    firing_at: dt.datetime | None
    clearing_since: dt.datetime | None = Field(
        description="Since when what fires does not hold any more, or nothing is known of it."
    )
    resolved_at: dt.datetime | None
    resolution: str = Field(description="Why it resolved; empty before.")
    silenced: bool = Field(description="A silence matches it: nobody is told of it now.")
    acknowledged_at: dt.datetime | None
    acknowledged_by: str
    comment: str


class Acknowledgement(Request):
    """Somebody looks after an alert: it is not told again while it fires."""

    model_config = example(comment="the switch of line 3 is being replaced")

    comment: Comment = ""


class AlertCount(Response):
    """How many alerts are alike."""

    state: AlertState
    severity: Severity
    acknowledged: bool
    silenced: bool
    count: int


class AlertCounts(Response):
    """Open alerts by state and severity."""

    pending: int
    firing: int
    unacknowledged: int = Field(description="Of those that fire, neither acknowledged nor silenced.")
    items: list[AlertCount]


class RouteKind(StrEnum):
    """By which way a route tells."""

    WEBHOOK = "webhook"  # to every webhook of the fleet that subscribed to shoal.alert.*
    EMAIL = "email"
    MQTT = "mqtt"


class RouteSpec(Request):
    """Who is told of which rules, and how often."""

    kind: RouteKind
    to: list[Annotated[str, Field(max_length=254)]] = Field(
        default_factory=list, max_length=50, description="Addresses; of e-mail only."
    )
    least_severity: Severity = Field(Severity.INFO, description="Only rules that are at least as severe.")
    rules: list[Name] = Field(default_factory=list, max_length=200, description="Only these rules; none: every one.")
    wait_s: float = Field(
        30.0, ge=0, le=3600, description="How long news wait for others of their rule, to be told together, in seconds."
    )
    interval_s: float = Field(
        300.0, ge=0, le=DAY_S, description="Shortest time between two notices of news of one rule, in seconds."
    )
    repeat_s: float = Field(
        4 * 3600.0, ge=0, le=30 * DAY_S, description="When what still fires is told again, in seconds; 0: never."
    )
    enabled: bool = True

    @field_validator("to")
    @classmethod
    def _are_addresses(cls, value: list[str]) -> list[str]:
        wrong = next((one for one in value if not MAIL.match(one)), None)
        if wrong is not None:
            raise ValueError(f"{wrong[:80]!r} is no address such as ops@example.org")
        return value

    @model_validator(mode="after")
    def _has_whom_to_tell(self) -> Self:
        if (self.kind is RouteKind.EMAIL) != bool(self.to):
            raise ValueError("to: a route by e-mail has addresses, and no other has")
        return self

    @property
    def timing(self) -> Timing:
        """How often it wants to hear."""
        return Timing(self.wait_s, self.interval_s, self.repeat_s)

    def wants(self, rule: str, severity: Severity) -> bool:
        """Whether it is told of a rule."""
        return self.enabled and severity.covers(self.least_severity) and (not self.rules or rule in self.rules)


class RouteCreate(RouteSpec):
    """A new route."""

    model_config = example(name="night-shift", kind="email", to=["ops@example.org"], least_severity="critical")

    name: Name


class RouteUpdate(Request):
    """What to change of a route; absent fields stay as they are."""

    model_config = example(least_severity="critical", repeat_s=3600)

    to: list[str] | None = Field(None, max_length=50)
    least_severity: Severity | None = None
    rules: list[Name] | None = Field(None, max_length=200)
    wait_s: float | None = None
    interval_s: float | None = None
    repeat_s: float | None = None
    enabled: bool | None = None


class RouteView(Response):
    """A route."""

    observed = frozenset({"waiting", "dead", "last_detail"})

    id: str
    name: str
    kind: RouteKind
    to: list[str]
    least_severity: Severity
    rules: list[str]
    wait_s: float
    interval_s: float
    repeat_s: float
    enabled: bool
    shipped: bool
    waiting: int | None = Field(None, description="E-mails that are to be sent; only when one route is shown.")
    dead: int | None = Field(None, description="E-mails that were given up in the last days; likewise.")
    last_detail: str = Field("", description="What the mail server said last to one that it did not take; likewise.")
    created_by: str
    created_at: dt.datetime


class RouteTest(Response):
    """That a test notice is on its way."""

    route: str
    told: str = Field(description="Where to look for it.")


class SilenceCreate(Request):
    """Tell nobody of what matches; at least one of rule, query and subject is given, and all that are must match."""

    model_config = example(query="site==plant7", ends_at="2026-12-01T06:00:00Z", comment="power works until Tuesday")

    rule: str | None = Field(None, min_length=1, max_length=64, description="A rule's name; a `*` stands for any text.")
    query: Query | None = None
    subject: str | None = Field(
        None, min_length=1, max_length=256, description="Such as `device/cam-*`; a `*` stands for any text."
    )
    starts_at: dt.datetime | None = Field(None, description="Now when absent.")
    ends_at: dt.datetime
    comment: str = Field(min_length=1, max_length=500, description="Why.")

    @model_validator(mode="after")
    def _matches_something(self) -> Self:
        if (self.rule, self.query, self.subject) == (None, None, None):
            raise ValueError("give rule, query or subject: a silence of everything hides what nobody thought of")
        return self


class SilenceView(Response):
    """A silence."""

    observed = frozenset({"active"})

    id: str
    rule: str | None
    query: str | None
    subject: str | None
    starts_at: dt.datetime
    ends_at: dt.datetime
    active: bool
    comment: str
    created_by: str
    created_at: dt.datetime
