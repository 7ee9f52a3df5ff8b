"""HTTP of telemetry."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query

from fleet_server.catalog import service as catalog
from fleet_server.clock import utc_now
from fleet_server.devices import service as devices
from fleet_server.http import AppSettings, FleetId, ModelName, ReadSession, VersionName
from fleet_server.models import HostWindowRow
from fleet_server.openapi import problems
from fleet_server.paging import ComputedList, PageRequest, in_utc, page, paged
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page
from fleet_server.telemetry import repository, series, service
from fleet_server.telemetry.repository import WindowFilter
from fleet_server.telemetry.schemas import HostTelemetry, ModelTelemetry, TelemetrySteps

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


@router.get(
    "/models/{model}/versions/{version}/telemetry",
    summary="What a version did over time",
    responses=problems("model_not_found", "version_not_found", "bad_query", "bad_series"),
)
def telemetry_series(
    session: ReadSession,
    fleet_id: FleetId,
    settings: AppSettings,
    model: ModelName,
    version: VersionName,
    device: Annotated[str | None, Query(description="Only this device.")] = None,
    query: Annotated[str | None, Query(max_length=4096, description="Only devices it holds for, in RSQL.")] = None,
    since: Annotated[dt.datetime | None, Query(description="24 steps before `until` when absent.")] = None,
    until: Annotated[dt.datetime | None, Query(description="Now when absent.")] = None,
    step: Annotated[str, Query(description="10s to 1h, whole hours up to 1d, or whole days.", examples=["5m"])] = "1h",
) -> TelemetrySteps:
    """Requests, errors, latency percentiles and accuracy in equal steps, at most 1,000 of them.

    A percentile is that of all requests of all devices in the step, not a mean of percentiles; accuracy is there where
    programs sent labels to the devices' feedback endpoint. Steps shorter than an hour reach back as far as windows are
    kept (`SHOAL_TELEMETRY_WINDOWS_DAYS`), those shorter than a day as far as hours are.
    """
    catalog.get_version(session, fleet_id, model, version)
    found = devices.query_condition(session, fleet_id, query, field="query") if query is not None else None
    wanted = WindowFilter(device_id=device, devices=found, since=in_utc(since, "since"), until=in_utc(until, "until"))
    step_s = series.read_step(step)
    return series.series(
        session, fleet_id, settings, wanted, model=model, version=version, step_s=step_s, now=utc_now()
    )


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
