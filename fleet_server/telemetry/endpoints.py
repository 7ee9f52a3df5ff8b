"""HTTP of telemetry."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query

from fleet_server.http import FleetId, ReadSession
from fleet_server.models import HostWindowRow
from fleet_server.paging import ComputedList, PageRequest, in_utc, page, paged
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page
from fleet_server.telemetry import repository, service
from fleet_server.telemetry.schemas import HostTelemetry, ModelTelemetry

router = APIRouter(tags=["telemetry"], route_class=ApiRoute)
MODELS = ComputedList[ModelTelemetry](
    lambda row: f"{row.model}@{row.version}@{row.device_id}",
    {"model": lambda row: row.model, "requests": lambda row: row.requests, "errors": lambda row: row.errors},
    default="model",
)
ModelPaging = Annotated[PageRequest, Depends(paged(MODELS))]
HostPaging = Annotated[PageRequest, Depends(paged(repository.HOSTS))]


@router.get("/telemetry/models", summary="What versions did on devices")
def model_telemetry(
    session: ReadSession,
    fleet_id: FleetId,
    paging: ModelPaging,
    model: Annotated[str | None, Query(description="Only this model.")] = None,
    version: Annotated[str | None, Query(description="Only this version.")] = None,
    device: Annotated[str | None, Query(description="Only this device.")] = None,
    since: Annotated[dt.datetime | None, Query(description="Windows that ended at or after this time.")] = None,
    until: Annotated[dt.datetime | None, Query(description="Windows that ended before this time.")] = None,
    by: Annotated[Literal["device", "version"], Query(description="One row a device, or one over all.")] = "device",
) -> Page[ModelTelemetry]:
    """Requests, errors, latency percentiles, and, where programs sent labels, accuracy, recall and F1."""
    rows = service.summarize(
        session,
        fleet_id,
        model=model,
        version=version,
        device_id=device,
        since=in_utc(since, "since"),
        until=in_utc(until, "until"),
        by_device=by == "device",
    )
    return page(MODELS.page(rows, paging), paging, lambda row: row)


@router.get("/telemetry/hosts", summary="How devices themselves were")
def host_telemetry(
    session: ReadSession,
    fleet_id: FleetId,
    paging: HostPaging,
    device: Annotated[str | None, Query(description="Only this device.")] = None,
) -> Page[HostTelemetry]:
    """CPU, memory, temperature and disk at the end of each window, newest first."""
    rows = repository.host_windows(session, fleet_id, paging, device)
    return page(rows, paging, _host)


def _host(row: HostWindowRow) -> HostTelemetry:
    return HostTelemetry(
        device_id=row.device_id,
        at=row.ended_at,
        cpu_percent=row.cpu_percent,
        memory_used_mb=row.memory_used_mb,
        agent_rss_mb=row.agent_rss_mb,
        temperature_c=row.temperature_c,
        disk_free_mb=row.disk_free_mb,
    )
