"""Releases of the agent: the list, pushing a bundle by form, and one release, who runs it and how it is rolled out."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from agent.protocol.release import AGENT
from fleet_server.web.api import Api, Json, PageApi, RefusalError, refuse_field, segment
from fleet_server.web.fields import place
from fleet_server.web.forms import Form, read_form
from fleet_server.web.pages.overview import UNDER_WAY
from fleet_server.web.templating import render

FIELDS = ("digest",)
ROLE = "agent-releases"  # of the fleet's TUF repository: what vouches for releases
BLANK = {"digest": "", "digest_name": ""}
SHOWN = 50
router = APIRouter(include_in_schema=False)


@router.get("/ui/agent-releases")
async def agent_releases(request: Request, api: PageApi, cursor: str = "") -> Response:
    """The list, newest first."""
    page, agents, *rollouts = await asyncio.gather(
        api.get("/agent-releases", limit=SHOWN, cursor=cursor),
        api.get("/overview"),
        *(api.get("/rollouts", model=AGENT, state=state, limit=SHOWN) for state in UNDER_WAY),
    )
    under_way: dict[str, list[Json]] = {}
    for one in (one for found in rollouts for one in found["items"]):
        under_way.setdefault(one["version"], []).append(one)
    return render(
        request,
        "agent_releases.html",
        page=page,
        under_way=under_way,
        agents=agents["agent_versions"],
        first=not page["items"] and not cursor,
    )


@router.get("/ui/agent-releases/new")
async def new(request: Request, api: PageApi) -> Response:
    """The form to push a bundle; who may not see releases gets none."""
    await api.get("/agent-releases", limit=1)
    return _new(request, BLANK)


@router.post("/ui/agent-releases/new")
async def push(request: Request, api: PageApi) -> Response:
    """Add a bundle that is uploaded already to its release."""
    given = _typed(await read_form(request))
    try:
        if not given["digest"]:
            refuse_field("digest", "choose the file that `make agent-release` made, and wait until it is uploaded")
        made = await api.send("POST", "/agent-releases", {"digest": given["digest"]})
    except RefusalError as error:
        return _new(request, given, error)
    return RedirectResponse(f"/ui/agent-releases/{segment(made['version'])}", 303)


@router.get("/ui/agent-releases/{version}")
async def agent_release(request: Request, api: PageApi, version: str) -> Response:
    """One release: its bundles, who vouches for it, what devices run, its rollouts."""
    return await _page(request, api, version)


@router.get("/ui/agent-releases/{version}/now")
async def agent_release_now(request: Request, api: PageApi, version: str) -> Response:
    """The part of it that changes."""
    return render(request, "agent_release_now.html", **await _now(api, version))


@router.post("/ui/agent-releases/{version}/delete")
async def delete(request: Request, api: PageApi, version: str) -> Response:
    """Delete one that was never rolled out, unless a bundle has come to it since the page was shown."""
    tag = (await read_form(request)).text("tag")
    try:
        await api.send("DELETE", f"/agent-releases/{segment(version)}", tag=tag)
    except RefusalError as error:
        if error.status == 404:
            raise
        return await _page(request, api, version, said=error.problem, status=error.status)
    return RedirectResponse("/ui/agent-releases", 303)


def _typed(form: Form) -> Json:
    """The form as a person left it; a file that was uploaded need not be again."""
    return {name: form.text(name) for name in BLANK}


def _new(request: Request, given: Json, problem: RefusalError | None = None) -> Response:
    placed = place(problem.problem if problem else None, FIELDS)
    status = problem.status if problem else 200
    return render(request, "agent_release_new.html", status, given=given, said=placed.said, wrong=placed.wrong)


async def _page(request: Request, api: Api, version: str, *, said: object = None, status: int = 200) -> Response:
    _, tag = await api.tagged(f"/agent-releases/{segment(version)}")
    return render(request, "agent_release.html", status, said=said, tag=tag, **await _now(api, version))


async def _now(api: Api, version: str) -> dict[str, Any]:
    found = await api.get(f"/agent-releases/{segment(version)}")
    rollouts, overview, trust, pushes = await asyncio.gather(
        api.get("/rollouts", version=found["reference"], limit=SHOWN, sort="-created_at"),
        api.get("/overview"),
        api.get("/trust"),
        api.get("/audit-events", action="agent_release.create", subject=f"agent-release/{version}", limit=SHOWN),
    )
    pushed: dict[str, Json] = {}
    for event in pushes["items"]:  # newest first: one that was deleted may have been pushed again
        pushed.setdefault(event["detail"]["digest"], event)
    return {
        "release": found,
        "rollouts": rollouts["items"],
        "agents": overview["agent_versions"],
        "role": next((one for one in trust["roles"] if one["role"] == ROLE), None),
        "waiting": next((one for one in trust["waiting"] if one["role"] == ROLE), None),
        "pushed": pushed,
    }
