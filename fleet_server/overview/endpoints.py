"""HTTP of the overview."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

from fastapi import APIRouter, Query

from fleet_server.clock import utc_now
from fleet_server.errors import InvalidError
from fleet_server.http import FleetId, ReadSession
from fleet_server.openapi import problems
from fleet_server.overview import service
from fleet_server.overview.schemas import History, Overview
from fleet_server.paging import in_utc
from fleet_server.routes import ApiRoute
from fleet_server.telemetry.series import read_step
from fleet_server.telemetry.totals import HOUR_S

router = APIRouter(tags=["overview"], route_class=ApiRoute)


@router.get("/overview", summary="Show how the fleet is")
def show_overview(session: ReadSession, fleet_id: FleetId) -> Overview:
    """Counts of everything, the last hour's telemetry, and what would be done next.

    Telemetry counts as soon as it is added up: within half a minute of its coming.
    """
    return service.overview(session, fleet_id, utc_now())


@router.get("/overview/history", summary="Show how the fleet was", responses=problems("bad_series"))
def overview_history(
    session: ReadSession,
    fleet_id: FleetId,
    since: Annotated[dt.datetime | None, Query(description="24 steps before `until` when absent.")] = None,
    until: Annotated[dt.datetime | None, Query(description="Now when absent.")] = None,
    step: Annotated[str, Query(description="Whole hours up to 1d, or whole days.", examples=["6h"])] = "1h",
) -> History:
    """Devices, those online, versions in the field, requests, errors and latency, in at most 1,000 equal steps.

    It is kept hour by hour, for SHOAL_OVERVIEW_DAYS.
    """
    step_s = read_step(step)
    if step_s < HOUR_S:
        raise InvalidError("bad_series", "step: it is kept hour by hour: give 1h or more, such as 6h, 1d", field="step")
    return service.history(
        session, fleet_id, since=in_utc(since, "since"), until=in_utc(until, "until"), step_s=step_s, now=utc_now()
    )
