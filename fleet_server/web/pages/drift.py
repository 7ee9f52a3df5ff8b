"""Drift: which models on which devices have moved, and a version beside what it was like at first."""

from __future__ import annotations

import datetime as dt
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from fleet_server.clock import utc_now
from fleet_server.web.api import Json, PageApi, RefusalError, segment
from fleet_server.web.bars import bars
from fleet_server.web.templating import render

SPANS = {1: "the last hour", 6: "the last 6 hours", 24: "the last day", 168: "the last week"}
router = APIRouter(include_in_schema=False)


@router.get("/ui/drift")
async def drift(request: Request, api: PageApi, model: str = "", query: str = "", cursor: str = "") -> Response:
    """The list; of a query that can't be read, why."""
    filters = {"model": model, "query": query}
    given = {name: text for name, text in filters.items() if text}
    page: Json = {"items": [], "next_cursor": None}
    said, status = None, 200
    try:
        page = await api.get("/drift", limit=50, cursor=cursor, **filters)
    except RefusalError as error:
        if error.status != 422:
            raise
        said, status = error.problem, error.status
    return render(
        request,
        "drift.html",
        status,
        page=page,
        filters=filters,
        base=f"/ui/drift?{urlencode(given)}",
        said=said,
        first=not given and not cursor and not page["items"],
    )


@router.get("/ui/drift/{model}/{version}")
async def version(
    request: Request,
    api: PageApi,
    model: str,
    version: str,
    device: str = "",
    query: str = "",
    hours: Annotated[int, Query(ge=1, le=8760)] = 1,
) -> Response:
    """One version: the reference, and what there is now."""
    path = f"/models/{segment(model)}/versions/{segment(version)}/drift"
    since = (utc_now() - dt.timedelta(hours=hours)).isoformat()
    found, said, status = None, None, 200
    try:
        found = await api.get(path, device=device, query=query, since=since)
    except RefusalError as error:
        if error.status != 422:
            raise
        said, status = error.problem, error.status
    return render(
        request,
        "drift_version.html",
        status,
        model=model,
        version=version,
        drift=found,
        said=said,
        filters={"device": device, "query": query, "hours": hours},
        spans=SPANS if hours in SPANS else SPANS | {hours: f"the last {hours} hours"},
        pictures=[(one, bars(one)) for one in found["distributions"]] if found else [],
    )
