"""Alerts: what fires, silences, and lists of the rules and of who is told."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from fleet_server.clock import utc_now
from fleet_server.web.api import Api, Json, PageApi, RefusalError, refuse, refuse_field, segment
from fleet_server.web.fields import place
from fleet_server.web.forms import number, read_form
from fleet_server.web.templating import render

STATES = ("firing", "pending", "resolved")
SILENCE = {"rule": "", "query": "", "subject": "", "hours": "2", "comment": ""}
MOST_HOURS = 8760
router = APIRouter(include_in_schema=False)


@router.get("/ui/alerts")
async def alerts(request: Request, api: PageApi, state: str = "", rule: str = "", cursor: str = "") -> Response:
    """The page; of alerts those that are open, or in a state."""
    return await _page(request, api, state=state, rule=rule, cursor=cursor)


@router.get("/ui/alerts/now")
async def alerts_now(request: Request, api: PageApi, state: str = "", rule: str = "", cursor: str = "") -> Response:
    """The part of it that changes."""
    return render(request, "alerts_now.html", **await _now(api, state, rule, cursor))


@router.post("/ui/alerts/{alert_id}/acknowledge")
async def acknowledge(request: Request, api: PageApi, alert_id: str) -> Response:
    """Somebody looks after it."""
    form = await read_form(request)
    return await _do(
        request, api, "POST", f"/alerts/{segment(alert_id)}/acknowledge", {"comment": form.text("comment")}
    )


@router.post("/ui/alert-silences")
async def silence(request: Request, api: PageApi) -> Response:
    """Tell nobody for a while."""
    form = await read_form(request)
    typed = {name: form.text(name) for name in SILENCE}
    hours = number(typed["hours"])
    body: Json = {name: typed[name] or None for name in ("rule", "query", "subject")}
    try:
        if not isinstance(hours, float) or not 0 < hours <= MOST_HOURS:
            refuse_field("hours", f"a number above 0, at most {MOST_HOURS}")
        body |= {"ends_at": (utc_now() + dt.timedelta(hours=hours)).isoformat(), "comment": typed["comment"]}
        await api.send("POST", "/alert-silences", body)
    except RefusalError as error:
        placed = place(error.problem, SILENCE)
        return await _page(request, api, said=placed.said, wrong=placed.wrong, given=typed, status=error.status)
    return RedirectResponse("/ui/alerts", 303)


@router.post("/ui/alert-silences/{silence_id}/delete")
async def end_silence(request: Request, api: PageApi, silence_id: str) -> Response:
    """Tell again."""
    return await _do(request, api, "DELETE", f"/alert-silences/{segment(silence_id)}")


async def _do(request: Request, api: Api, method: str, path: str, body: Json | None = None) -> Response:
    try:
        await api.send(method, path, body)
    except RefusalError as error:
        return await _page(request, api, said=error.problem, status=error.status)
    return RedirectResponse("/ui/alerts", 303)


async def _now(api: Api, state: str, rule: str, cursor: str) -> dict[str, Any]:
    if state and state not in STATES:
        refuse(f"state: one of {', '.join(STATES)}")
    shown = [state] if state else ["firing", "pending"]
    counts, *pages = await asyncio.gather(
        api.get("/alert-counts"),
        *(api.get("/alerts", state=one, rule=rule, limit=50, cursor=cursor, sort="-since") for one in shown),
    )
    return {
        "counts": counts,
        "alerts": [one for page in pages for one in page["items"]],
        "cursor": pages[0]["next_cursor"] if state else None,
        "state": state,
        "rule": rule,
    }


async def _page(
    request: Request,
    api: Api,
    *,
    state: str = "",
    rule: str = "",
    cursor: str = "",
    said: object = None,
    wrong: dict[str, str] | None = None,
    given: dict[str, str] | None = None,
    status: int = 200,
) -> Response:
    now = await _now(api, state, rule, cursor)
    rules, silences, routes = await asyncio.gather(
        api.items("/alert-rules"), api.items("/alert-silences"), api.or_nothing("/alert-routes", limit=100)
    )
    return render(
        request,
        "alerts.html",
        status,
        said=said,
        wrong=wrong or {},
        given=given or SILENCE,
        rules=rules,
        silences=silences,
        routes=None if routes is None else routes["items"],
        states=STATES,
        **now,
    )
