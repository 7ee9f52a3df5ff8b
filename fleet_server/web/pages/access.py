"""Users, service tokens, fleets, and the tokens by which devices come in."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from fleet_server.web.api import Api, Json, PageApi, RefusalError, refuse, segment
from fleet_server.web.forms import read_form
from fleet_server.web.templating import render

ROLES = ("viewer", "operator", "releaser", "admin")
router = APIRouter(include_in_schema=False)


@router.get("/ui/access")
async def access(request: Request, api: PageApi) -> Response:
    """Who may do what."""
    return await _page(request, api)


@router.post("/ui/access/{what}")
async def make(request: Request, api: PageApi, what: str) -> Response:
    """Make a user, a service token or an enrolment token; a token's text is shown once."""
    form = await read_form(request)
    bodies: dict[str, Json] = {
        "users": {"name": form.text("name"), "password": form.text("password"), "role": form.text("role")},
        "tokens": {"name": form.text("name"), "role": form.text("role"), "days": _whole(form.text("days"))},
        "enrolment-tokens": {"uses": _whole(form.text("uses")), "ttl_s": _hours(form.text("hours"))},
    }
    try:
        if what not in bodies:
            refuse(f"there is nothing called {what!r} to make here", 404)
        made = await api.send("POST", f"/{what}", bodies[what])
    except RefusalError as error:
        return await _page(request, api, said=error.problem, status=error.status)
    return await _page(request, api, made=made if "token" in made else None)


@router.post("/ui/access/{what}/{name}/delete")
async def remove(request: Request, api: PageApi, what: str, name: str) -> Response:
    """Remove a user, or revoke a token."""
    try:
        if what not in {"users", "tokens", "enrolment-tokens"}:
            refuse(f"there is nothing called {what!r} to remove here", 404)
        await api.send("DELETE", f"/{what}/{segment(name)}")
    except RefusalError as error:
        return await _page(request, api, said=error.problem, status=error.status)
    return RedirectResponse("/ui/access", 303)


@router.post("/ui/enrolments/{enrolment_id}/{action}")
async def decide(request: Request, api: PageApi, enrolment_id: str, action: str) -> Response:
    """Let a device in, or not."""
    try:
        if action not in {"approve", "reject"}:
            refuse(f"an enrolment has no action {action!r}", 404)
        await api.send("POST", f"/enrolments/{segment(enrolment_id)}/{action}")
    except RefusalError as error:
        return await _page(request, api, said=error.problem, status=error.status)
    return RedirectResponse("/ui/access", 303)


def _whole(text: str) -> Any:
    return int(text) if text.isdigit() else text


def _hours(text: str) -> Any:
    return int(text) * 3600 if text.isdigit() else text


async def _page(
    request: Request, api: Api, *, said: object = None, made: Json | None = None, status: int = 200
) -> Response:
    async def rows(path: str, **parameters: Any) -> list[Json] | None:
        found = await api.or_nothing(path, limit=100, **parameters)
        return None if found is None else found["items"]

    return render(
        request,
        "access.html",
        status,
        said=said,
        made=made,
        me=await api.get("/me"),
        users=await rows("/users"),
        tokens=await rows("/tokens"),
        fleets=await rows("/fleets"),
        enrolments=await rows("/enrolments", state="pending"),
        enrolment_tokens=await rows("/enrolment-tokens"),
        roles=ROLES,
    )
