"""Alert rules by form: made, changed, turned on and off, deleted."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from fleet_server.domain.alerting import KINDS, Of, Severity
from fleet_server.web.api import Api, Json, PageApi, RefusalError, refuse, segment
from fleet_server.web.fields import place
from fleet_server.web.forms import Form, number, read_form
from fleet_server.web.templating import render

NUMBERS = ("threshold", "clear", "window_s", "for_s", "keep_s", "least_requests")
TEXTS = ("severity", "query", "model", "description")
FIELDS = ("name", "metric", *NUMBERS, "below", *TEXTS, "enabled")
SIDES = {"above": False, "below": True}
BLANK = dict.fromkeys(FIELDS, "") | {"for_s": "300", "keep_s": "0", "least_requests": "20", "enabled": "yes"}
SUBJECTS = {Of.DEVICE: "Of devices", Of.MODEL: "Of models on devices", Of.ROLLOUT: "Of rollouts"}
router = APIRouter(include_in_schema=False)


@router.get("/ui/alert-rules/new")
async def new(request: Request, api: PageApi) -> Response:
    """The form of a new rule."""
    return await _form(request, api, BLANK | {"severity": Severity.WARNING.value})


@router.post("/ui/alert-rules/new")
async def create(request: Request, api: PageApi) -> Response:
    """Make it."""
    typed = _typed(await read_form(request))
    body = {name: value for name, value in _wanted(typed).items() if value is not None}
    try:
        await api.send("POST", "/alert-rules", body | {"name": typed["name"], "metric": typed["metric"]})
    except RefusalError as error:
        return await _form(request, api, typed, problem=error)
    return RedirectResponse("/ui/alerts#rules", 303)


@router.get("/ui/alert-rules/{rule}/change")
async def show(request: Request, api: PageApi, rule: str) -> Response:
    """The form of a rule, as it is."""
    found, tag = await api.tagged(f"/alert-rules/{segment(rule)}")
    return await _form(request, api, _filled(found), rule=found, tag=tag)


@router.post("/ui/alert-rules/{rule}/change")
async def change(request: Request, api: PageApi, rule: str) -> Response:
    """Change what was typed anew, unless somebody has changed the rule since the form was shown."""
    form = await read_form(request)
    typed, tag, path = _typed(form), form.text("tag"), f"/alert-rules/{segment(rule)}"
    found = await api.get(path)
    was, wanted = _filled(found), _wanted(typed)
    try:
        await api.send("PATCH", path, {name: wanted[name] for name in wanted if typed[name] != was[name]}, tag=tag)
    except RefusalError as error:
        return await _form(request, api, typed, rule=found, tag=tag, problem=error)
    return RedirectResponse("/ui/alerts#rules", 303)


@router.post("/ui/alert-rules/{rule}/{action}")
async def act(api: PageApi, rule: str, action: str) -> Response:
    """Turn a rule on or off, or delete it."""
    path = f"/alert-rules/{segment(rule)}"
    match action:
        case "enable" | "disable":
            await api.send("PATCH", path, {"enabled": action == "enable"})
        case "delete":
            await api.send("DELETE", path)
        case _:
            refuse(f"a rule has no action {action!r}", 404)
    return RedirectResponse("/ui/alerts#rules", 303)


def _typed(form: Form) -> dict[str, str]:
    """The form as a person left it."""
    return {name: form.text(name) for name in FIELDS}


def _filled(rule: Json) -> dict[str, str]:
    """The form of a rule."""
    side = "" if rule["threshold"] is None else "below" if rule["below"] else "above"
    texts = {name: str(rule[name] or "") for name in ("name", "metric", *TEXTS)}
    numbers = {name: "" if rule[name] is None else f"{rule[name]:.15g}" for name in NUMBERS}
    if not rule["window_s"]:
        numbers["window_s"] = ""
    return texts | numbers | {"below": side, "enabled": "yes" if rule["enabled"] else ""}


def _wanted(typed: dict[str, str]) -> Json:
    """A rule as the API takes it, but for its name and metric."""
    numbers: Json = {name: number(typed[name]) for name in NUMBERS}
    texts = {name: typed[name] or None for name in ("severity", "query", "model")}
    more = {"below": SIDES.get(typed["below"]), "description": typed["description"]}
    return numbers | texts | more | {"enabled": bool(typed["enabled"])}


async def _form(
    request: Request,
    api: Api,
    given: dict[str, str],
    *,
    rule: Json | None = None,
    tag: str = "",
    problem: RefusalError | None = None,
) -> Response:
    placed = place(problem.problem if problem else None, FIELDS)
    models = await api.get("/models", limit=200)
    return render(
        request,
        "alert_rule.html",
        problem.status if problem else 200,
        given=given,
        rule=rule,
        tag=tag,
        said=placed.said,
        wrong=placed.wrong,
        metrics=_metrics(),
        severities=[one.value for one in Severity],
        models=[one["name"] for one in models["items"]],
    )


def _metrics() -> list[tuple[str, list[Any]]]:
    """What rules may look at, by what it is of, each with what it means and its unit."""
    return [
        (said, [(metric.value, kind) for metric, kind in KINDS.items() if kind.of is of])
        for of, said in SUBJECTS.items()
    ]
