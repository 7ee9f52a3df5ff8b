"""Devices: the list with its query, tags of many at once, and a device."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response

from agent.protocol.release import AGENT
from fleet_server.web.api import Api, Json, PageApi, RefusalError, refuse, segment
from fleet_server.web.forms import read_form
from fleet_server.web.plots import hosts, series
from fleet_server.web.templating import render

PAGE = 50
RELEASES = 3  # of the agent, the last that a device was sent
TOGETHER = 8  # changes that are under way at once
router = APIRouter(include_in_schema=False)


@router.get("/ui/devices")
async def devices(
    request: Request,
    api: PageApi,
    query: str = "",
    profile: str = "",
    online: str = "",
    cursor: str = "",
    changed: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """The list; of a query that can't be read, why."""
    filters = {"query": query, "profile": profile, "online": online}
    return await _list(request, api, filters, cursor, changed=changed)


@router.post("/ui/devices/tags")
async def tag(request: Request, api: PageApi) -> Response:
    """Give devices a tag, or take it away: those that are ticked, or all that the query holds for."""
    form = await read_form(request)
    name, value = form.text("tag"), form.text("value")
    filters = {key: form.text(key) for key in ("query", "profile", "online")}
    try:
        if not name:
            refuse("tag: it needs a name, such as site")
        chosen = form.texts("device")
        if form.checked("everything"):
            chosen = [one["id"] for one in await api.items("/devices", most=100_000, **filters)]
        if not chosen:
            refuse("devices: tick some, or choose all that the query holds for")
        for start in range(0, len(chosen), TOGETHER):
            part = chosen[start : start + TOGETHER]
            body = {"tags": {name: value or None}}
            await asyncio.gather(*(api.send("PATCH", f"/devices/{segment(one)}", body) for one in part))
    except RefusalError as error:
        return await _list(request, api, filters, "", said=error.problem, status=error.status)
    wanted = {key: text for key, text in filters.items() if text} | {"changed": len(chosen)}
    return RedirectResponse(f"/ui/devices?{urlencode(wanted)}", 303)


@router.get("/ui/devices/{device_id}")
async def device(request: Request, api: PageApi, device_id: str) -> Response:
    """One device."""
    return await _device(request, api, device_id)


@router.get("/ui/devices/{device_id}/now")
async def device_now(request: Request, api: PageApi, device_id: str) -> Response:
    """The part of it that changes."""
    return render(request, "device_now.html", **await _now(api, device_id))


@router.post("/ui/devices/{device_id}/{action}")
async def act(request: Request, api: PageApi, device_id: str, action: str) -> Response:
    """Hold, release or pin it, or change its tags."""
    form = await read_form(request)
    path = f"/devices/{segment(device_id)}"
    try:
        match action:
            case "hold":
                await api.send("POST", f"{path}/hold", {"reason": form.text("reason")})
            case "release":
                await api.send("POST", f"{path}/release")
            case "pin":
                await api.send("POST", f"{path}/pin", {"version": form.text("version"), "reason": form.text("reason")})
            case "tags":
                name = form.text("tag")
                await api.send("PATCH", path, {"tags": {name: form.text("value") or None}})
            case _:
                refuse(f"a device has no action {action!r}", 404)
    except RefusalError as error:
        return await _device(request, api, device_id, said=error.problem, status=error.status)
    return RedirectResponse(f"/ui/devices/{segment(device_id)}", 303)


async def _list(
    request: Request, api: Api, filters: Json, cursor: str, *, said: object = None, status: int = 200, changed: int = 0
) -> Response:
    page: Json = {"items": [], "next_cursor": None}
    try:
        page = await api.get("/devices", limit=PAGE, cursor=cursor, **filters)
    except RefusalError as error:
        said, status = said or error.problem, error.status
    profiles = await api.items("/profiles")
    given = {key: text for key, text in filters.items() if text}
    return render(
        request,
        "devices.html",
        status,
        page=page,
        profiles=profiles,
        filters=filters,
        base=f"/ui/devices?{urlencode(given)}",
        said=said,
        changed=changed,
        first=not given and not cursor and not page["items"] and said is None,
    )


async def _now(api: Api, device_id: str) -> dict[str, Any]:
    path = f"/devices/{segment(device_id)}"
    found, deployments, releases = await asyncio.gather(
        api.get(path),
        api.get("/deployments", device=device_id, limit=20, sort="-created_at"),
        api.get("/deployments", device=device_id, model=AGENT, limit=RELEASES, sort="-created_at"),
    )
    return {
        "device": found,
        "agent": _agent(found["facts"]),
        "deployments": deployments["items"],
        "releases": releases["items"],
    }


def _agent(facts: Json) -> Json:
    """What a device says of its agent; empty where it has not, or is from before there were releases."""
    said = facts.get("agent") or {}
    texts = {name: said.get(name) or "" for name in ("platform", "self_update", "release", "installed")}
    return texts | {"version": facts.get("agent_version") or "", "launcher": said.get("launcher") or 0}


async def _device(request: Request, api: Api, device_id: str, *, said: object = None, status: int = 200) -> Response:
    now = await _now(api, device_id)
    windows = (await api.get("/telemetry/hosts", device=device_id, limit=200))["items"]
    commands = await api.get("/commands", device=device_id, limit=10)
    identity = await api.or_nothing(f"/devices/{segment(device_id)}/identity")
    plots = []
    for one in now["device"]["serving"][:4]:
        path = f"/models/{segment(one['model'])}/versions/{segment(one['version'])}/telemetry"
        found = await api.or_nothing(path, device=device_id, step="5m")
        if found is not None:
            plots.append((f"{one['model']}@{one['version']}: latency", series(found, "latency")))
    more = {"plots": plots, "host": hosts(windows), "identity": identity, "commands": commands["items"]}
    return render(request, "device.html", status, said=said, **more, **now)
