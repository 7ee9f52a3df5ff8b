"""Samples: which are to be kept on devices, who asked for them, and what came."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from fleet_server.clock import utc_now
from fleet_server.db import Base, new_id


class SamplingRule(Base):
    """Devices of a profile are to keep samples of a model. `spec` is `fleet_server.samples.schemas.SamplingSpec`."""

    __tablename__ = "sampling_rules"
    __table_args__ = (UniqueConstraint("fleet_id", "model_id", "profile_id"), Index(None, "profile_id"))

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    profile_id: Mapped[str] = mapped_column(ForeignKey("profiles.id", ondelete="CASCADE"))
    spec: Mapped[dict[str, Any]]
    created_by: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)


class SampleRequestRow(Base):
    """Somebody asked devices for what they keep of a model. `state` is `fleet_server.samples.schemas.RequestState`."""

    __tablename__ = "sample_requests"
    __table_args__ = (Index(None, "fleet_id", "id"), Index(None, "state", "deadline_at"))

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    model: Mapped[str]  # its name: the model may go, what came of it stays
    state: Mapped[str]
    samples: Mapped[int]  # of each device, at most
    size: Mapped[int]  # bytes of each device's file, at most
    created_by: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=utc_now)
    deadline_at: Mapped[dt.datetime]
    finished_at: Mapped[dt.datetime | None]


class SampleUpload(Base):
    """One device's part in a request: its file, and where that lies in the artifact store once it has come."""

    __tablename__ = "sample_uploads"
    __table_args__ = (
        Index(None, "fleet_id", "id"),
        Index(None, "request_id"),
        Index(None, "device_id", "told"),
        Index(None, "digest"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    fleet_id: Mapped[str] = mapped_column(ForeignKey("fleets.id"))
    request_id: Mapped[str] = mapped_column(ForeignKey("sample_requests.id"))
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.id"))
    phase: Mapped[str]  # fleet_server.samples.schemas.UploadState
    told: Mapped[bool] = mapped_column(default=True)  # it is in what the device is told
    samples: Mapped[int] = mapped_column(default=0)
    digest: Mapped[str | None]  # of the file, of which pieces have come
    size: Mapped[int] = mapped_column(default=0)
    received: Mapped[int] = mapped_column(default=0)  # bytes, from the first one on
    reason: Mapped[str] = mapped_column(default="")
    detail: Mapped[str] = mapped_column(default="")
    waiting: Mapped[dict[str, Any] | None]  # agent.protocol.delivery.Waiting, as JSON
    listing: Mapped[list[Any] | None]  # agent.samples' listing of the file, as JSON
    stored_at: Mapped[dt.datetime | None]
    finished_at: Mapped[dt.datetime | None]


class SamplePieceRow(Base):
    """A piece of a file that has not come whole."""

    __tablename__ = "sample_pieces"

    upload_id: Mapped[str] = mapped_column(ForeignKey("sample_uploads.id"), primary_key=True)
    offset: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[bytes]
