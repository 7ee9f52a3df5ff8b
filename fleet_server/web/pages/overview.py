"""The first page: how the fleet is and was, what is under way, and what would be done next."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fleet_server.clock import utc_now
from fleet_server.web.api import Api, PageApi
from fleet_server.web.plots import history, versions_over_time
from fleet_server.web.templating import render

UNDER_WAY = ("running", "awaiting_approval", "paused", "reverting")
SPANS = {"1d": (1, "1h"), "7d": (7, "6h"), "30d": (30, "1d")}
router = APIRouter(include_in_schema=False)


@router.get("/ui")
async def overview(request: Request, api: PageApi, span: str = "7d") -> Response:
    """All of it."""
    chosen = span if span in SPANS else "7d"
    now, past = await asyncio.gather(_now(api), _past(api, chosen))
    return render(request, "overview.html", span=chosen, spans=list(SPANS), **now, **past)


@router.get("/ui/overview/now")
async def overview_now(request: Request, api: PageApi) -> Response:
    """The part of it that changes."""
    return render(request, "overview_now.html", **await _now(api))


async def _now(api: Api) -> dict[str, Any]:
    found, firing, *rollouts = await asyncio.gather(
        api.get("/overview"),
        api.get("/alerts", state="firing", limit=10, sort="-since"),
        *(api.get("/rollouts", state=state, limit=10) for state in UNDER_WAY),
    )
    under_way = [one for page in rollouts for one in page["items"]]
    return {"overview": found, "firing": firing["items"], "rollouts": under_way}


async def _past(api: Api, span: str) -> dict[str, Any]:
    days, step = SPANS[span]
    found = await api.get("/overview/history", since=_since(days), step=step)
    return {"past": history(found), "in_the_field": versions_over_time(found)}


def _since(days: int) -> str:
    return (utc_now() - dt.timedelta(days=days)).isoformat()
