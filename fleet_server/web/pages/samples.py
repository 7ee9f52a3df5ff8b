"""Samples: where rows that models were unsure of are kept, asking devices for them, and what they sent."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from fleet_server.web.api import Api, Json, PageApi, RefusalError, segment
from fleet_server.web.fields import Placed, place
from fleet_server.web.forms import Form, number, read_form
from fleet_server.web.templating import render

HOUR_S = 3600.0
KEEP = {"model": "", "profile": "", "samples": "100", "megabytes": "16", "days": "7", "below": "0.6"}
ASK = {"model": "", "devices": "", "query": "", "samples": "100", "megabytes": "16", "hours": "24"}
router = APIRouter(include_in_schema=False)


@router.get("/ui/samples")
async def samples(
    request: Request, api: PageApi, model: str = "", device: str = "", query: str = "", cursor: str = ""
) -> Response:
    """All there is: rules, requests, and what came."""
    given = ASK | {"model": model, "devices": device, "query": query}
    return await _page(request, api, ask=given, keep=KEEP | {"model": model}, cursor=cursor)


@router.post("/ui/samples/keep")
async def keep_samples(request: Request, api: PageApi) -> Response:
    """Have devices of a profile keep samples of a model."""
    typed = _typed(await read_form(request), KEEP)
    spec = {name: number(typed[name]) for name in ("samples", "megabytes", "days", "below") if typed[name]}
    path = f"/models/{segment(typed['model'])}/sampling-rules/{segment(typed['profile'])}"
    try:
        await api.send("PUT", path, spec)
    except RefusalError as error:
        placed = place(error.problem, KEEP)
        return await _page(request, api, keep=typed, kept=placed, status=error.status)
    return RedirectResponse("/ui/samples", 303)


@router.post("/ui/samples/stop/{model}/{profile}")
async def stop(api: PageApi, model: str, profile: str) -> Response:
    """Have them keep none."""
    await api.send("DELETE", f"/models/{segment(model)}/sampling-rules/{segment(profile)}")
    return RedirectResponse("/ui/samples", 303)


@router.post("/ui/samples/ask")
async def ask_devices(request: Request, api: PageApi) -> Response:
    """Ask devices for what they keep."""
    typed = _typed(await read_form(request), ASK)
    hours = number(typed["hours"])
    body: Json = {
        "model": typed["model"],
        "devices": typed["devices"].replace(",", " ").split(),
        "query": typed["query"] or None,
        "timeout_s": hours * HOUR_S if isinstance(hours, float) else hours,
    }
    body |= {name: number(typed[name]) for name in ("samples", "megabytes")}
    try:
        made = await api.send("POST", "/sample-requests", {name: one for name, one in body.items() if one is not None})
    except RefusalError as error:
        placed = place(_in_hours(error.problem), ASK)
        return await _page(request, api, ask=typed, asked=placed, status=error.status)
    return RedirectResponse(f"/ui/samples/requests/{segment(made['id'])}", 303)


@router.get("/ui/samples/requests/{request_id}")
async def show_request(request: Request, api: PageApi, request_id: str) -> Response:
    """One request, live: what came of each device, or why it has none."""
    found = await api.get(f"/sample-requests/{segment(request_id)}")
    return render(request, "sample_request.html", asked=found)


@router.get("/ui/samples/requests/{request_id}/now")
async def show_request_now(request: Request, api: PageApi, request_id: str) -> Response:
    """The part of it that changes."""
    found = await api.get(f"/sample-requests/{segment(request_id)}")
    return render(request, "sample_request_now.html", asked=found)


@router.post("/ui/samples/requests/{request_id}/cancel")
async def cancel(api: PageApi, request_id: str) -> Response:
    """Devices send no more of it."""
    await api.send("POST", f"/sample-requests/{segment(request_id)}/cancel")
    return RedirectResponse(f"/ui/samples/requests/{segment(request_id)}", 303)


@router.get("/ui/samples/sets/{set_id}")
async def sample_set(request: Request, api: PageApi, set_id: str) -> Response:
    """One file: what is in it."""
    return render(request, "sample_set.html", sample_set=await api.get(f"/sample-sets/{segment(set_id)}"))


@router.post("/ui/samples/sets/{set_id}/delete")
async def delete(api: PageApi, set_id: str) -> Response:
    """Delete it at once."""
    await api.send("DELETE", f"/sample-sets/{segment(set_id)}")
    return RedirectResponse("/ui/samples", 303)


def _typed(form: Form, fields: dict[str, str]) -> dict[str, str]:
    return {name: form.text(name) for name in fields}


def _in_hours(problem: Json) -> Json:
    """A complaint of the API about seconds, at the form's field, which has hours."""
    problems = [
        {"field": "hours", "detail": "a number above 0, at most 720"} if one["field"] == "timeout_s" else one
        for one in problem.get("problems") or ()
    ]
    return problem | {"problems": problems}


async def _page(
    request: Request,
    api: Api,
    *,
    keep: dict[str, str] = KEEP,
    kept: Placed | None = None,
    ask: dict[str, str] = ASK,
    asked: Placed | None = None,
    cursor: str = "",
    status: int = 200,
) -> Response:
    rules, requests, sets, models, profiles = await asyncio.gather(
        api.items("/sampling-rules"),
        api.get("/sample-requests", limit=20),
        api.get("/sample-sets", limit=50, cursor=cursor),
        api.items("/models"),
        api.items("/profiles"),
    )
    return render(
        request,
        "samples.html",
        status,
        keep=keep,
        kept=kept or Placed(),
        ask=ask,
        asked=asked or Placed(),
        rules=rules,
        requests=requests["items"],
        sets=sets,
        models=[one["name"] for one in models],
        profiles=[one["name"] for one in profiles],
    )
