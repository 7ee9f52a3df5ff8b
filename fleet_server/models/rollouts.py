"""Rollouts and deployments."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, UniqueConstraint, false, text
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class Rollout(Base):
    """Moving a set of devices to a version. `state` is `fleet_server.domain.states.RolloutState`."""

    __tablename__ = "rollouts"
    __table_args__ = (
        Index(None, "fleet_id", "id"),
        Index(None, "fleet_id", "state", "id"),
        Index(None, "version_id"),
        Index(None, "state"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    name: Mapped[str]
    version_id: Mapped[str] = mapped_column(ForeignKey("versions.id"))
    state: Mapped[str]
    target: Mapped[dict[str, Any]]  # RolloutTarget, as JSON
    strategy: Mapped[dict[str, Any]]  # RolloutStrategy, as JSON
    delivery: Mapped[dict[str, Any] | None]  # fleet_server.devices.delivery.Delivery, as JSON
    stage: Mapped[int] = mapped_column(default=0)
    stage_started_at: Mapped[dt.datetime | None]
    began_at: Mapped[dt.datetime | None]  # when its first stage did
    let_on: Mapped[int] = mapped_column(default=0, server_default=text("0"))  # the highest stage somebody let begin
    joined_at: Mapped[dt.datetime | None]  # when devices that came to meet its target were last looked for
    joined_after: Mapped[str] = mapped_column(default="", server_default="")  # the last device that was looked at then
    pacing: Mapped[dict[str, Any] | None]  # fleet_server.domain.machine.Allowance, as JSON
    verdicts: Mapped[list[Any]] = mapped_column(default=list)  # StageVerdict, as JSON; only ever appended
    terms: Mapped[dict[str, Any]] = mapped_column(default=dict)  # Terms, as JSON: what holds when it starts
    traceparent: Mapped[str | None]  # the span of the request that created it, where it is traced
    created_by: Mapped[str] = mapped_column(default="")
    creator_id: Mapped[str] = mapped_column(default="")  # fleet_server.principals.Principal.id
    approvals_needed: Mapped[int] = mapped_column(default=0)
    approvals: Mapped[list[Any]] = mapped_column(default=list)  # Approval, as JSON; only ever appended
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    finished_at: Mapped[dt.datetime | None]


class Deployment(Base):
    """One device's part in a rollout.

    `phase` is `agent.protocol.lifecycle.Phase`, or `scheduled` until its stage begins. `desired` marks the one
    deployment of a model that its device ought to run.
    """

    __tablename__ = "deployments"
    __table_args__ = (
        UniqueConstraint("rollout_id", "device_id", "revert_of", "attempt"),
        Index(
            "ix_deployments_rollout_id_phase",
            *("rollout_id", "phase", "stage", "place"),
            *("revert_of", "replaced", "is_waiting"),  # so that a rollout is counted without its rows
        ),
        Index(None, "fleet_id", "id"),
        Index(None, "fleet_id", "phase", "id"),
        Index(None, "fleet_id", "device_id", "id"),
        Index(None, "device_id", "model_id", "id"),
        Index(
            "ix_deployments_rolled_back",
            *("fleet_id", "settled_at"),
            sqlite_where=text("phase = 'rolled_back'"),
            postgresql_where=text("phase = 'rolled_back'"),
        ),
        Index(
            "ix_deployments_fell_back",
            "fleet_id",
            sqlite_where=text("fell_back <> ''"),
            postgresql_where=text("fell_back <> ''"),
        ),
        Index(
            "uq_deployments_desired",
            "device_id",
            "model_id",
            unique=True,
            sqlite_where=text("desired = 1"),
            postgresql_where=text("desired"),
        ),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    rollout_id: Mapped[str] = mapped_column(ForeignKey("rollouts.id"))
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    version_id: Mapped[str] = mapped_column(ForeignKey("versions.id"))
    variant_id: Mapped[str] = mapped_column(ForeignKey("variants.id"))
    previous_id: Mapped[str | None] = mapped_column(ForeignKey("deployments.id"))  # what the device ran before
    revert_of: Mapped[str] = mapped_column(default="")  # the deployment this one takes back; empty when none
    stage: Mapped[int]
    place: Mapped[int] = mapped_column(default=0, server_default=text("0"))  # in the order in which devices come
    attempt: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    replaced: Mapped[bool] = mapped_column(default=False, server_default=false())  # by another attempt
    evidence: Mapped[bytes | None] = mapped_column(LargeBinary)  # fleet_server.rollouts.evidence
    exposure: Mapped[dict[str, Any] | None]  # agent.protocol.messages.Exposure, as JSON: as its device is to run it now
    exposed_at: Mapped[dt.datetime | None]  # when its device first said so
    phase: Mapped[str] = mapped_column(default="scheduled")
    desired: Mapped[bool] = mapped_column(default=False)
    failure: Mapped[dict[str, Any] | None]  # {"code", "detail"}
    probation: Mapped[dict[str, Any] | None]  # agent.protocol.messages.ProbationReport, as JSON
    loading_s: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))  # how long it is being loaded
    fell_back: Mapped[str] = mapped_column(default="", server_default="")  # ServingReport.fell_back, as last reported
    fell_back_at: Mapped[dt.datetime | None]  # when it first said so
    is_waiting: Mapped[bool] = mapped_column(default=False, server_default=false())
    waiting: Mapped[dict[str, Any] | None]  # agent.protocol.delivery.Waiting, as JSON
    received_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    encoding: Mapped[str] = mapped_column(default="")  # codec it came by; empty when as it is
    missing_chunks: Mapped[int] = mapped_column(default=0)
    sources: Mapped[dict[str, Any]] = mapped_column(default=dict)  # bytes by the source that brought them
    attempts: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    sent_at: Mapped[dt.datetime | None]  # when it became desired
    serving_at: Mapped[dt.datetime | None]  # when the device first said it served it
    settled_at: Mapped[dt.datetime | None]  # when it became active or ended
