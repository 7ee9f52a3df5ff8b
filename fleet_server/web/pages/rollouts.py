"""Rollouts: the list, the form with its dry run, and a rollout live."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from agent.protocol.release import AGENT
from fleet_server.domain.strategy import StopMetric
from fleet_server.web.api import Api, Json, PageApi, RefusalError, refuse, segment
from fleet_server.web.fields import place
from fleet_server.web.forms import Form, number, read_form
from fleet_server.web.plots import bands
from fleet_server.web.templating import render

ACTIONS = ("approve", "reject", "pause", "resume", "abort", "revert", "promote", "retry")
STATES = ("awaiting_approval", "running", "paused", "reverting", "succeeded", "stopped", "reverted")
SHARE, COUNT = "percent", "count"
FIELDS = ("version", "name", "query")  # complaints of stages and rules, which are many, stand above
CALLED = {"target": "query"}
router = APIRouter(include_in_schema=False)


@router.get("/ui/rollouts")
async def rollouts(request: Request, api: PageApi, state: str = "", model: str = "", cursor: str = "") -> Response:
    """The list, newest first."""
    page = await api.get("/rollouts", state=state, model=model, cursor=cursor, limit=50, sort="-created_at")
    base = f"/ui/rollouts?state={segment(state)}&model={segment(model)}"
    return render(request, "rollouts.html", page=page, state=state, model=model, states=STATES, base=base)


@router.get("/ui/rollouts/new")
async def new(request: Request, api: PageApi, version: str = "") -> Response:
    """The form."""
    return await _new(request, api, _filled(version))


@router.post("/ui/rollouts/preview")
async def preview(request: Request, api: PageApi) -> Response:
    """The dry run of what the form says: a part of the page."""
    form = await read_form(request)
    try:
        found = await api.send("POST", "/rollouts/dry-run", _wanted(form))
    except RefusalError as error:
        return render(request, "rollout_preview.html", said=error.problem, preview=None)
    return render(request, "rollout_preview.html", said=None, preview=found)


@router.post("/ui/rollouts/new")
async def create(request: Request, api: PageApi) -> Response:
    """Start it."""
    form = await read_form(request)
    try:
        made = await api.send("POST", "/rollouts", _wanted(form))
    except RefusalError as error:
        return await _new(request, api, _typed(form), error)
    return RedirectResponse(f"/ui/rollouts/{segment(made['id'])}", 303)


@router.get("/ui/rollouts/{rollout_id}")
async def rollout(request: Request, api: PageApi, rollout_id: str) -> Response:
    """One rollout, live."""
    return render(request, "rollout.html", said=None, **await _now(api, rollout_id))


@router.get("/ui/rollouts/{rollout_id}/now")
async def rollout_now(request: Request, api: PageApi, rollout_id: str) -> Response:
    """The part of it that changes."""
    return render(request, "rollout_now.html", **await _now(api, rollout_id))


@router.post("/ui/rollouts/{rollout_id}/{action}")
async def act(request: Request, api: PageApi, rollout_id: str, action: str) -> Response:
    """Approve, reject, pause, resume, abort, revert, promote, or retry what failed."""
    form = await read_form(request)
    path = f"/rollouts/{segment(rollout_id)}"
    bodies: dict[str, Json | None] = {
        "approve": {"comment": form.text("comment")},
        "reject": {"comment": form.text("comment")},
        "abort": {"revert": False},
        "revert": {"revert": True},
        "promote": {"full": form.checked("full")},
    }
    try:
        if action not in ACTIONS:
            refuse(f"a rollout has no action {action!r}", 404)
        await api.send("POST", f"{path}/{'abort' if action == 'revert' else action}", bodies.get(action))
    except RefusalError as error:
        return render(request, "rollout.html", error.status, said=error.problem, **await _now(api, rollout_id))
    return RedirectResponse(f"/ui/rollouts/{segment(rollout_id)}", 303)


def _filled(version: str) -> Json:
    """The form as it begins: a canary, a tenth, all; stopped by failures, latency or errors, and taken back."""
    stages = [
        {"size": "5", "unit": SHARE, "soak": "600", "approval": ""},
        {"size": "25", "unit": SHARE, "soak": "600", "approval": ""},
        {"size": "100", "unit": SHARE, "soak": "0", "approval": ""},
    ]
    rules = [
        {"metric": "failed_percent", "above": "5", "against": "past"},
        {"metric": "latency_p95_ratio", "above": "1.3", "against": "past"},
        {"metric": "error_rise_points", "above": "2", "against": "past"},
    ]
    if _of_agent(version):  # which answers no requests: its rules count deployments
        rules = rules[:1]
    given = {"version": version, "name": "", "query": "", "all": True, "on_stop": "revert", "unproven": False}
    return given | {"stages": stages, "rules": rules}


def _of_agent(version: str) -> bool:
    """Whether it is a release of the agent."""
    return version.startswith(f"{AGENT}@")


def _typed(form: Form) -> Json:
    """The form as a person left it."""
    stages = [
        {"size": size, "unit": unit, "soak": soak, "approval": approval}
        for size, unit, soak, approval in zip(
            form.all("stage_size"),
            form.all("stage_unit"),
            form.all("stage_soak"),
            form.all("stage_approval"),
            strict=False,
        )
    ]
    rules = [
        {"metric": metric, "above": above, "against": against}
        for metric, above, against in zip(
            form.all("rule_metric"), form.all("rule_above"), form.all("rule_against"), strict=False
        )
    ]
    return {
        "version": form.text("version"),
        "name": form.text("name"),
        "query": form.text("query"),
        "all": form.text("who") == "all",
        "on_stop": form.text("on_stop"),
        "unproven": form.checked("unproven"),
        "stages": stages,
        "rules": rules,
    }


def _wanted(form: Form) -> Json:
    """A rollout as the API takes it."""
    typed = _typed(form)
    target: Json = {"all": True} if typed["all"] else {"query": typed["query"]}
    stages = [
        {
            (COUNT if one["unit"] == COUNT else SHARE): _whole(one["size"], one["unit"]),
            "soak_s": number(one["soak"]) or 0,
            "approval": one["approval"] == "yes",
        }
        for one in typed["stages"]
        if one["size"]
    ]
    rules = [
        {"metric": one["metric"], "above": number(one["above"]), "against": one["against"] or "past"}
        for one in typed["rules"]
        if one["metric"] and one["above"]
    ]
    strategy: Json = {"stages": stages, "stop_when": rules, "on_stop": typed["on_stop"] or "revert"}
    return {
        "version": typed["version"],
        "name": typed["name"] or None,
        "target": target,
        "strategy": strategy,
        "allow_unproven": typed["unproven"],
    }


def _whole(text: str, unit: str) -> Any:
    found = number(text)
    return int(found) if unit == COUNT and isinstance(found, float) and found.is_integer() else found


async def _new(request: Request, api: Api, given: Json, problem: RefusalError | None = None) -> Response:
    ready, releases, schema = await asyncio.gather(
        api.items("/variants", state="ready"), api.get("/agent-releases", limit=20), api.get("/schemas/rollout")
    )
    versions = {f"{one['model']}@{one['version']}" for one in ready} | {one["reference"] for one in releases["items"]}
    placed = place(problem.problem if problem else None, FIELDS, CALLED)
    return render(
        request,
        "rollout_new.html",
        problem.status if problem else 200,
        given=given,
        said=placed.said,
        wrong=placed.wrong,
        references=sorted(versions, reverse=True),
        metrics=_metrics(schema, given),
        release=_of_agent(given["version"]),
    )


def _metrics(schema: Json, given: Json) -> list[str]:
    """The metrics that a stop rule may have, as the published schema lists them; of a release, those that it has."""
    found = [str(name) for name in schema.get("$defs", {}).get("StopMetric", {}).get("enum", [])]
    if not _of_agent(given["version"]):
        return found
    typed = {one["metric"] for one in given["rules"]}  # what was chosen stays, also where it is refused
    return [name for name in found if name in typed or StopMetric(name).counted]


async def _now(api: Api, rollout_id: str) -> dict[str, Any]:
    path = f"/rollouts/{segment(rollout_id)}"
    found, explained, compared, failed, all_of_them = await api.all(
        path,
        f"{path}/explain",
        f"{path}/comparison",
        f"{path}/deployments?phase=failed&limit=20",
        f"{path}/deployments?limit=50&sort=-created_at",
    )
    cohorts = [cohort | {"figures": [bands(one) for one in cohort["figures"]]} for cohort in compared["cohorts"]]
    shown = {one["id"]: one for one in (*failed["items"], *all_of_them["items"])}
    return {
        "rollout": found,
        "explained": explained,
        "cohorts": cohorts,
        "deployments": list(shown.values()),
        "actions": _actions(found),
    }


def _actions(rollout: Json) -> list[str]:
    """What may be done to it as it stands now."""
    failed = rollout["counts"]["failed"] > 0
    match rollout["state"]:
        case "awaiting_approval":
            return ["approve", "reject"]
        case "running":
            return ["pause", "promote", "abort", "revert"]
        case "paused":
            return ["resume", *(["retry"] if failed else []), "abort", "revert"]
        case "succeeded" | "stopped":
            return ["retry"] if failed else []
        case _:
            return []
