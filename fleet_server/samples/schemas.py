"""HTTP shapes of samples."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum
from typing import Any

from pydantic import Field

from agent.protocol.limits import LIMITS, MIB
from fleet_server.schemas import Name, Request, Response, Waiting, example

SAMPLES_FOLDER = "samples"  # of the artifact store
MOST_DEVICES = 1000


class RequestState(StrEnum):
    """Where a request for samples is."""

    RUNNING = "running"
    DONE = "done"  # each device's part is over, with samples or without
    CANCELLED = "cancelled"


class UploadState(StrEnum):
    """Where one device's part in a request is."""

    PENDING = "pending"  # its device has not begun
    SENDING = "sending"
    STORED = "stored"  # its samples are here
    EMPTY = "empty"  # its device keeps none
    FAILED = "failed"
    CANCELLED = "cancelled"
    DELETED = "deleted"  # they were here


class SamplingSpec(Request):
    """What devices of a profile are to keep of what a model is asked: of a classifier, the rows it is least sure of.

    A device keeps nothing unless its own configuration allows it (`samples.allow`).
    """

    model_config = example(samples=100, megabytes=16, days=7, below=0.6)

    samples: int = Field(100, ge=1, le=LIMITS.samples, description="How many rows at most.")
    megabytes: float = Field(16.0, ge=0.001, le=LIMITS.sampled_bytes / MIB, description="Of all of them, in MiB.")
    sample_megabytes: float = Field(
        1.0, ge=0.0001, le=LIMITS.sample_bytes / MIB, description="A row that takes more, in MiB, is not kept."
    )
    days: float = Field(7.0, gt=0, le=LIMITS.sample_days, description="How long one is kept on the device.")
    below: float = Field(0.6, gt=0, le=1, description="Only rows whose confidence is below this, 0 to 1.")


class SamplingRuleView(Response):
    """A rule: devices of the profile keep samples of the model."""

    model: str
    profile: str
    spec: SamplingSpec
    created_by: str
    created_at: dt.datetime


class SampleRequestCreate(Request):
    """Ask devices for what they keep of a model."""

    model_config = example(model="mnist", query="site==plant7", samples=50)

    model: Name
    devices: list[Name] = Field(default_factory=list, max_length=MOST_DEVICES, description="These devices.")
    query: str | None = Field(None, max_length=4096, description="Devices it holds for, in RSQL.")
    samples: int = Field(100, ge=1, le=LIMITS.samples, description="Of each device, the least sure ones first.")
    megabytes: float = Field(
        16.0, ge=0.01, le=LIMITS.sample_file_bytes / MIB, description="Of each device's file at most, in MiB."
    )
    timeout_s: float = Field(
        86_400.0, gt=0, le=30 * 86_400, description="When what has not come counts as failed, in seconds."
    )


class SampleUploadView(Response):
    """One device's part in a request."""

    id: str
    device_id: str
    state: UploadState
    samples: int
    size: int = Field(description="Bytes of its file.")
    received: int = Field(description="Bytes of it that are here.")
    reason: str = Field(description="Why there are none: not_allowed, off, none_kept, timeout, agent_too_old, …")
    detail: str
    waiting: Waiting | None = Field(description="What the device waits for, such as a byte budget of its link.")


class SampleRequestView(Response):
    """A request for samples."""

    observed = frozenset({"uploads", "counts"})

    id: str
    model: str
    state: RequestState
    samples: int
    megabytes: float
    uploads: list[SampleUploadView]
    counts: dict[UploadState, int] = Field(description="How many devices' parts are in each state that one is in.")
    created_by: str
    created_at: dt.datetime
    deadline_at: dt.datetime
    finished_at: dt.datetime | None


class SampleSetView(Response):
    """Samples that a device sent."""

    id: str
    request_id: str
    device_id: str
    model: str
    samples: int
    size: int = Field(description="Bytes of the file.")
    digest: str = Field(description="SHA-256 of the file.")
    stored_at: dt.datetime
    kept_until: dt.datetime = Field(description="When it is deleted by itself.")


class SampleSetDetail(SampleSetView):
    """The same with what is in the file."""

    listing: list[dict[str, Any]] = Field(
        description="Of each sample version, digest, confidence, time (Unix seconds by the device's clock), and the "
        "datatypes and shapes of its tensors; the n-th one's are `{n}/in/{name}` and `{n}/out/{name}` in the file."
    )
