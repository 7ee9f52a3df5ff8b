"""Commands to a device, what came of them, and its log as it is written."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from fleet_server.web.api import Api, Json, PageApi, RefusalError, segment
from fleet_server.web.forms import read_form
from fleet_server.web.templating import render

KINDS = ("restart-runtime", "benchmark", "facts", "identify", "logs")
LOG_S = 900
router = APIRouter(include_in_schema=False)


@router.post("/ui/devices/{device_id}/command")
async def send(request: Request, api: PageApi, device_id: str) -> Response:
    """Ask the device to do something."""
    form = await read_form(request)
    body: Json = {"kind": form.text("kind")}
    if body["kind"] == "logs":
        body |= {"lines": 200, "follow": True, "level": form.text("level") or "INFO", "timeout_s": LOG_S}
    try:
        made = await api.send("POST", f"/devices/{segment(device_id)}/commands", body)
    except RefusalError as error:
        return render(request, "problem.html", error.status, heading="The command was not sent", said=error.problem)
    return RedirectResponse(f"/ui/commands/{segment(made['id'])}", 303)


@router.get("/ui/commands/{command_id}")
async def command(request: Request, api: PageApi, command_id: str) -> Response:
    """One command."""
    return await _page(request, api, command_id)


@router.get("/ui/commands/{command_id}/now")
async def command_now(request: Request, api: PageApi, command_id: str) -> Response:
    """The part of it that changes."""
    found = await api.get(f"/commands/{segment(command_id)}")
    return render(request, "command_now.html", command=found)


@router.post("/ui/commands/{command_id}/cancel")
async def cancel(request: Request, api: PageApi, command_id: str) -> Response:
    """End it."""
    try:
        await api.send("POST", f"/commands/{segment(command_id)}/cancel")
    except RefusalError as error:
        return await _page(request, api, command_id, said=error.problem, status=error.status)
    return RedirectResponse(f"/ui/commands/{segment(command_id)}", 303)


async def _page(request: Request, api: Api, command_id: str, *, said: object = None, status: int = 200) -> Response:
    found = await api.get(f"/commands/{segment(command_id)}")
    return render(request, "command.html", status, command=found, said=said)
