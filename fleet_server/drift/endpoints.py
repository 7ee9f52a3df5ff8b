"""HTTP of drift."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from sqlalchemy import ColumnElement
from sqlalchemy.orm import Session

from fleet_server.catalog import service as catalog
from fleet_server.clock import utc_now
from fleet_server.devices import service as devices
from fleet_server.drift import repository, service
from fleet_server.drift.repository import OfVersion
from fleet_server.drift.schemas import DriftRow, DriftView
from fleet_server.http import FleetId, ModelName, ReadSession, VersionName
from fleet_server.openapi import problems
from fleet_server.paging import PageRequest, in_utc, page, paged
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page

router = APIRouter(tags=["telemetry"], route_class=ApiRoute)
Paging = Annotated[PageRequest, Depends(paged(repository.DRIFTS))]
OfDevice = Annotated[str | None, Query(description="Only this device.")]
OfDevices = Annotated[str | None, Query(max_length=4096, description="Only devices it holds for, in RSQL.")]


@router.get("/drift", summary="List how far models on devices have moved", responses=problems("bad_query"))
def list_drift(
    session: ReadSession,
    fleet_id: FleetId,
    paging: Paging,
    model: Annotated[str | None, Query(description="Only this model.")] = None,
    version: Annotated[str | None, Query(description="Only this version.")] = None,
    device: OfDevice = None,
    query: OfDevices = None,
) -> Page[DriftRow]:
    """The worst first: what inputs, answers and confidences were like when drift was last looked at.

    Alert rules for drift look every ten minutes, and compare each deployment on each device with what it was like when
    it was first looked at. Without such a rule nothing comes here; a device whose model is asked nothing keeps the row
    that it has.
    """
    found = repository.drifts(
        session, paging, fleet_id, model=model, version=version, device_id=device,
        devices=_condition(session, fleet_id, query),
    )  # fmt: skip
    thresholds = service.Thresholds(session, fleet_id)
    return page(found, paging, lambda one: service.row(one, thresholds))


@router.get(
    "/models/{model}/versions/{version}/drift",
    summary="Show how a version's inputs and answers have moved",
    responses=problems("model_not_found", "version_not_found", "bad_query", "bad_series"),
)
def show_drift(
    session: ReadSession,
    fleet_id: FleetId,
    model: ModelName,
    version: VersionName,
    device: OfDevice = None,
    query: OfDevices = None,
    since: Annotated[dt.datetime | None, Query(description="An hour before `until` when absent.")] = None,
    until: Annotated[dt.datetime | None, Query(description="Now when absent.")] = None,
) -> DriftView:
    """Histograms of each input, output, of confidences and of classes: now, beside what the same version was at first.

    Figures are those of stop rules and alert rules, here over all devices together: at most 200 devices and 2,000 of
    their windows are read, drawn evenly. Both sides are of the same devices.
    """
    _, found = catalog.get_version(session, fleet_id, model, version)
    wanted = OfVersion(fleet_id, model, version, device, _condition(session, fleet_id, query))
    return service.compare(
        session, wanted, found.labels, since=in_utc(since, "since"), until=in_utc(until, "until"), now=utc_now()
    )


def _condition(session: Session, fleet_id: str, query: str | None) -> ColumnElement[bool] | None:
    return None if query is None else devices.query_condition(session, fleet_id, query, field="query")
