"""Alert routes by form: who is told of alerts, by which way and how often."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from fleet_server.domain.alerting import Severity
from fleet_server.web.api import Api, Json, PageApi, RefusalError, refuse, segment
from fleet_server.web.fields import place
from fleet_server.web.forms import Form, number, read_form
from fleet_server.web.templating import render

TIMES = ("wait_s", "interval_s", "repeat_s")
FIELDS = ("name", "kind", "to", "least_severity", "rules", *TIMES, "enabled")
WAYS = (
    ("email", "e-mail"),
    ("mqtt", "MQTT: the topic of the fleet's alerts"),
    ("webhook", "webhooks that want shoal.alert.*"),
)
BLANK: Json = {"name": "", "kind": "email", "to": "", "least_severity": Severity.WARNING.value, "rules": []}
TIMING = {"wait_s": "30", "interval_s": "300", "repeat_s": "14400"}
router = APIRouter(include_in_schema=False)


@router.get("/ui/alert-routes/new")
async def new(request: Request, api: PageApi) -> Response:
    """The form of a new route."""
    return await _form(request, api, BLANK | TIMING | {"enabled": "yes"})


@router.post("/ui/alert-routes/new")
async def create(request: Request, api: PageApi) -> Response:
    """Make it."""
    typed = _typed(await read_form(request))
    body = {name: value for name, value in _wanted(typed).items() if value is not None}
    try:
        await api.send("POST", "/alert-routes", body | {"name": typed["name"], "kind": typed["kind"]})
    except RefusalError as error:
        return await _form(request, api, typed, problem=error)
    return RedirectResponse("/ui/alerts#routes", 303)


@router.get("/ui/alert-routes/{route}/change")
async def show(request: Request, api: PageApi, route: str) -> Response:
    """The form of a route, as it is, with what became of its e-mails."""
    found, tag = await api.tagged(f"/alert-routes/{segment(route)}")
    return await _form(request, api, _filled(found), route=found, tag=tag)


@router.post("/ui/alert-routes/{route}/change")
async def change(request: Request, api: PageApi, route: str) -> Response:
    """Change what was typed anew, unless somebody has changed the route since the form was shown."""
    form = await read_form(request)
    typed, tag, path = _typed(form), form.text("tag"), f"/alert-routes/{segment(route)}"
    found = await api.get(path)
    was, wanted = _filled(found), _wanted(typed)
    try:
        await api.send("PATCH", path, {name: wanted[name] for name in wanted if typed[name] != was[name]}, tag=tag)
    except RefusalError as error:
        return await _form(request, api, typed, route=found, tag=tag, problem=error)
    return RedirectResponse("/ui/alerts#routes", 303)


@router.post("/ui/alert-routes/{route}/{action}")
async def act(request: Request, api: PageApi, route: str, action: str) -> Response:
    """Tell it something, to see that it arrives; or delete it."""
    path = f"/alert-routes/{segment(route)}"
    match action:
        case "test":
            made = await api.send("POST", f"{path}/test")
            found, tag = await api.tagged(path)
            return await _form(request, api, _filled(found), route=found, tag=tag, tried=made["told"])
        case "delete":
            await api.send("DELETE", path)
        case _:
            refuse(f"a route has no action {action!r}", 404)
    return RedirectResponse("/ui/alerts#routes", 303)


def _typed(form: Form) -> Json:
    """The form as a person left it."""
    return {name: form.text(name) for name in FIELDS} | {"rules": form.texts("rules")}


def _filled(route: Json) -> Json:
    """The form of a route."""
    times = {name: f"{route[name]:.15g}" for name in TIMES}
    same: Json = {name: route[name] for name in ("name", "kind", "least_severity", "rules")}
    return same | times | {"to": "\n".join(route["to"]), "enabled": "yes" if route["enabled"] else ""}


def _wanted(typed: Json) -> Json:
    """A route as the API takes it, but for its name and kind."""
    times: Json = {name: number(typed[name]) for name in TIMES}
    to = typed["to"].replace(",", " ").split()
    same = {"least_severity": typed["least_severity"], "rules": typed["rules"]}
    return times | same | {"to": to, "enabled": bool(typed["enabled"])}


async def _form(
    request: Request,
    api: Api,
    given: Json,
    *,
    route: Json | None = None,
    tag: str = "",
    problem: RefusalError | None = None,
    tried: str = "",
) -> Response:
    placed = place(problem.problem if problem else None, FIELDS)
    rules = await api.items("/alert-rules")
    return render(
        request,
        "alert_route.html",
        problem.status if problem else 200,
        given=given,
        route=route,
        tag=tag,
        tried=tried,
        said=placed.said,
        wrong=placed.wrong,
        ways=WAYS,
        severities=[one.value for one in Severity],
        rules=[one["name"] for one in rules],
    )
