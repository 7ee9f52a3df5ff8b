"""HTTP shapes of shard plans."""

from __future__ import annotations

import datetime as dt
from enum import StrEnum

from pydantic import Field

from fleet_server.schemas import Request, Response, example


class PlanState(StrEnum):
    """Where a shard plan is."""

    PLANNED = "planned"  # a dry run: nothing of it is kept
    DEPLOYING = "deploying"  # stages are built, signed and rolled out
    ACTIVE = "active"  # every stage serves on its device
    FAILED = "failed"  # a stage could not be built or rolled out, or no device can take over a lost one


class ShardPlanCreate(Request):
    """Cut a version into stages for devices; each stage becomes a model of its own and is rolled out to its device."""

    model_config = example(version="detector@3", stages=3, target="site==plant7;memory_mb>=2048", rows=4)

    version: str = Field(description="`model@version`, with an ONNX form.", pattern=r"^[^@\s]+@[^@\s]+$")
    stages: int | None = Field(None, ge=1, le=8, description="How many; null for the fewest that fit the devices.")
    target: str = Field(
        min_length=1, max_length=4096, description="Devices to choose from, in RSQL as for the list of devices."
    )
    rows: int = Field(1, ge=1, le=1024, description="Of a micro-batch: a device holds the activations of so many.")
    memory_mb: float | None = Field(
        None,
        gt=0,
        le=1_000_000,
        description="MiB that a stage may take on any device, in weights and activations. The profile's memory budget "
        "holds as well. Default: a quarter of the device's memory.",
    )
    lost_after_s: float = Field(
        60.0, ge=1, le=86_400, description="Seconds that a device may be offline before its stage goes to another."
    )
    dry_run: bool = Field(False, description="Cut and compare, and keep nothing.")


class StageView(Response):
    """One stage."""

    model: str = Field(description="Its model's name.")
    version: str
    device: str
    nodes: int
    compute_s: float = Field(description="Seconds a row on its device, as far as its speed is known.")
    weight_bytes: int
    activation_bytes: int = Field(description="Held at most, for all rows of a micro-batch.")
    memory_limit: int = Field(description="Bytes that a stage may take on its device.")
    bytes_in: int = Field(description="A row.")
    bytes_out: int = Field(description="A row.")
    transfer_s: float = Field(description="Seconds a row over its device's link, in and out.")
    speed: float = Field(description="Of its device beside the server; 1 where nothing is known.")
    rollout: str | None = Field(None, description="That brought it to its device.")
    serves: bool = False


class ProofView(Response):
    """How the stages' answers compare with the whole's, on rows of its data."""

    difference: float = Field(description="The largest, where both are optimized; relative where over 1.")
    exact: bool = Field(description="Whether they are the same bit for bit where nothing is optimized.")
    quantized: bool = Field(description="Whether integers of one byte alone pass from stage to stage.")
    whole_s: float = Field(description="Seconds a row of the whole on the server.")


class ShardPlanView(Response):
    """A version in stages."""

    observed = frozenset({"stages", "state", "detail", "updated_at"})

    id: str | None = Field(description="Null of a dry run.")
    model: str
    version: str
    state: PlanState
    detail: str = Field(description="What it waits for, or why it failed.")
    stages: list[StageView]
    slowest_s: float = Field(description="Seconds a row of the slowest stage, compute and transfer: what bounds it.")
    proof: ProofView
    created_by: str
    created_at: dt.datetime
    updated_at: dt.datetime
