"""Models, their versions and variants: lists, upload, builds, and why each candidate was picked or refused."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from fleet_server.domain.candidates import quality_of
from fleet_server.web.api import Api, Json, PageApi, RefusalError, refuse, segment
from fleet_server.web.fields import place
from fleet_server.web.forms import Form, read_form
from fleet_server.web.plots import scatter, series
from fleet_server.web.templating import render

FORMATS = {".onnx": "onnx", ".tflite": "tflite", ".safetensors": "safetensors"}
TEXTS = ("model", "version", "labels", "min_accuracy", "architecture")
DATA = ("evaluation", "calibration", "training")
BLANK: Json = {**dict.fromkeys((*TEXTS, *DATA), ""), "sources": []}
CALLED = {"name": "version", "gate": "min_accuracy"}
router = APIRouter(include_in_schema=False)


@router.get("/ui/models")
async def models(request: Request, api: PageApi, cursor: str = "") -> Response:
    """The list."""
    page = await api.get("/models", limit=50, cursor=cursor)
    return render(request, "models.html", page=page, first=not page["items"] and not cursor)


@router.get("/ui/models/new")
async def new(request: Request, api: PageApi, model: str = "") -> Response:
    """The form to push a version."""
    return await _new(request, api, {"model": model})


@router.post("/ui/models/new")
async def push(request: Request, api: PageApi) -> Response:
    """Make a version of files that are uploaded already."""
    form = await read_form(request)
    given = _typed(form)
    try:
        if not given["model"]:
            refuse("model: it needs a name, such as cameras")
        made = await api.send("POST", f"/models/{segment(given['model'])}/versions", _version(form))
    except RefusalError as error:
        return await _new(request, api, given, error)
    return RedirectResponse(f"/ui/models/{segment(made['model'])}/{segment(made['name'])}", 303)


@router.get("/ui/models/{model}")
async def model(request: Request, api: PageApi, model: str, cursor: str = "") -> Response:
    """One model: its versions."""
    path = f"/models/{segment(model)}"
    found = await api.get(path)
    page = await api.get(f"{path}/versions", limit=50, cursor=cursor, sort="-created_at")
    telemetry = await api.get("/telemetry/models", model=model, by="version", limit=100)
    rollouts = await api.get("/rollouts", model=model, limit=10, sort="-created_at")
    done = {row["version"]: row for row in telemetry["items"]}
    return render(request, "model.html", model=found, page=page, done=done, rollouts=rollouts["items"])


@router.get("/ui/models/{model}/{version}")
async def version(request: Request, api: PageApi, model: str, version: str) -> Response:
    """One version: what it is, its variants, and how it does in the field."""
    return await _version_page(request, api, model, version)


@router.get("/ui/models/{model}/{version}/variants")
async def variants_now(request: Request, api: PageApi, model: str, version: str) -> Response:
    """The part that changes while variants are built."""
    return render(request, "variants_now.html", variants=await _variants(api, f"{model}@{version}"))


@router.post("/ui/models/{model}/{version}/build")
async def build(request: Request, api: PageApi, model: str, version: str) -> Response:
    """Build its variants for the profiles that are ticked; none: for all."""
    form = await read_form(request)
    body = {"version": f"{model}@{version}", "profiles": form.texts("profile"), "rebuild": form.checked("rebuild")}
    try:
        await api.send("POST", "/variants", body)
    except RefusalError as error:
        return await _version_page(request, api, model, version, said=error.problem, status=error.status)
    return RedirectResponse(f"/ui/models/{segment(model)}/{segment(version)}", 303)


@router.get("/ui/variants/{variant_id}")
async def variant(request: Request, api: PageApi, variant_id: str) -> Response:
    """One variant: its candidates, the gate, and where it comes from."""
    return await _variant_page(request, api, variant_id)


@router.post("/ui/variants/{variant_id}/{action}")
async def act(request: Request, api: PageApi, variant_id: str, action: str) -> Response:
    """Cancel its build, or have devices measure its candidates."""
    try:
        found = await api.get(f"/variants/{segment(variant_id)}")
        match action:
            case "cancel":
                await api.send("POST", f"/variants/{segment(variant_id)}/cancel")
            case "gate":
                body = {"version": f"{found['model']}@{found['version']}", "profile": found["profile"]}
                await api.send("POST", "/gate-runs", body)
            case _:
                refuse(f"a variant has no action {action!r}", 404)
    except RefusalError as error:
        return await _variant_page(request, api, variant_id, said=error.problem, status=error.status)
    return RedirectResponse(f"/ui/variants/{segment(variant_id)}", 303)


def _version(form: Form) -> Json:
    """What the form says, as the API takes it."""
    files = zip(form.all("source"), form.all("source_name"), strict=False)
    sources = [{"format": _format(name), "digest": digest} for digest, name in files if digest]
    body: Json = {
        "name": form.text("version"),
        "sources": sources,
        "labels": [line for line in form.text("labels").splitlines() if line],
        "gate": {"min_accuracy": form.number("min_accuracy")},
        "architecture": form.text("architecture") or None,
    }
    return body | {name: form.text(name) or None for name in DATA}


def _format(name: str) -> str:
    return next((form for end, form in FORMATS.items() if name.lower().endswith(end)), name)


def _typed(form: Form) -> Json:
    """The form as a person left it; files that were uploaded need not be again."""
    files = zip(form.all("source"), form.all("source_name"), strict=False)
    kept = [{"digest": digest, "name": name} for digest, name in files]
    return {name: form.text(name) for name in (*TEXTS, *DATA)} | {"sources": kept}


async def _new(request: Request, api: Api, given: Json, problem: RefusalError | None = None) -> Response:
    architectures = (await api.get("/architectures", limit=200))["items"]
    placed = place(problem.problem if problem else None, (*TEXTS, *DATA, "sources"), CALLED)
    return render(
        request,
        "model_new.html",
        problem.status if problem else 200,
        given=BLANK | given,
        said=placed.said,
        wrong=placed.wrong,
        architectures=architectures,
    )


async def _variants(api: Api, reference: str) -> list[Json]:
    return await api.items("/variants", version=reference)


async def _version_page(
    request: Request, api: Api, model: str, version: str, *, said: object = None, status: int = 200
) -> Response:
    path = f"/models/{segment(model)}/versions/{segment(version)}"
    found = await api.get(path)
    telemetry = await api.get(f"{path}/telemetry", step="1h")
    return render(
        request,
        "version.html",
        status,
        said=said,
        version=found,
        variants=await _variants(api, found["reference"]),
        profiles=await api.items("/profiles"),
        latency=series(telemetry, "latency"),
        requests=series(telemetry, "requests"),
        accuracy=series(telemetry, "accuracy"),
        labelled=any(point["labelled"] for point in telemetry["points"]),
    )


async def _variant_page(
    request: Request, api: Api, variant_id: str, *, said: object = None, status: int = 200
) -> Response:
    found = await api.get(f"/variants/{segment(variant_id)}")
    reference = f"{found['model']}@{found['version']}"
    runs: list[Any] = [
        run
        for run in (await api.get("/gate-runs", version=reference, limit=50, sort="-created_at"))["items"]
        if run["profile"] == found["profile"]
    ]
    return render(
        request,
        "variant.html",
        status,
        said=said,
        variant=found,
        runs=runs,
        picture=scatter(found["candidates"]),
        quality=quality_of(found["candidates"]),
    )
