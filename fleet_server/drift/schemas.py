"""HTTP shapes of drift."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from typing import Literal

from pydantic import Field

from fleet_server.domain.alerting import Metric
from fleet_server.schemas import Response


class Source(StrEnum):
    """Where a reference comes from."""

    KEPT = "kept"  # what series were like when alert rules first looked at them
    FIRST_WINDOWS = "first_windows"  # none is kept: the first windows that there are
    NONE = "none"  # nor are there windows from before the time that is looked at


class DriftFigure(Response):
    """How far one thing has moved, as alert rules and stop rules measure it."""

    metric: Metric
    measure: Literal["psi", "ks"]
    value: float | None = Field(description="Null where one of both sides says too little of it.")
    threshold: float | None = Field(
        description="Of the fleet's alert rule for all devices that fires first; null: it has none."
    )
    rule: str | None = Field(description="That rule's name.")


class DriftBin(Response):
    """One bin of a histogram, with its share of each side."""

    label: str
    low: float | None = Field(description="Lower edge; null where there is none, and of what is no number.")
    high: float | None = Field(description="Upper edge, likewise.")
    reference: float | None = Field(description="Share of the reference, 0 to 1; null where that has nothing of it.")
    now: float | None = Field(description="Share of what there is now, likewise.")


class DriftDistribution(Response):
    """How one thing is spread now, beside the reference; of a sample of the rows."""

    kind: Literal["input", "output", "confidence", "predicted"]
    tensor: str | None = Field(description="Name of the input or output.")
    part: str | None = Field(description="Of a tensor: the `mean` of each row, or the `deviation` within each row.")
    measure: Literal["psi", "ks"]
    distance: float | None = Field(description="Between both, less what is chance; null where one is empty.")
    reference_rows: int
    now_rows: int
    bins: list[DriftBin]


class DriftNow(Response):
    """What is looked at."""

    since: dt.datetime
    until: dt.datetime
    requests: int = Field(description="Of the windows that were read: they are drawn evenly where there are many.")
    devices: int


class DriftReferenceView(Response):
    """What it is compared with."""

    source: Source
    since: dt.datetime | None = Field(description="First windows: from when on. Kept: when the first of it was taken.")
    until: dt.datetime | None = Field(description="First windows: up to when. Kept: when the last of it was taken.")
    requests: int
    devices: int


class DriftView(Response):
    """A version now, beside what the same version was like at first."""

    model: str
    version: str
    now: DriftNow
    reference: DriftReferenceView
    figures: list[DriftFigure]
    distributions: list[DriftDistribution] = Field(description="The ones that moved most first.")


class DriftRow(Response):
    """How far a model on a device had moved when an alert rule for drift last looked at it."""

    device_id: str
    model: str
    version: str
    worst: float = Field(description="The largest of the three figures.")
    input_drift: float | None
    output_drift: float | None
    confidence_shift: float | None
    over: bool = Field(description="Whether a figure is beyond the threshold of an alert rule for all devices.")
    requests: int = Field(description="Of the windows that were read.")
    since: dt.datetime = Field(description="Windows that ended from then")
    at: dt.datetime = Field(description="to then: when it was looked at.")
