"""Signing in and out, and which fleet a person looks at."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from fleet_server.web.api import Api, PageApi, RefusalError
from fleet_server.web.cookies import choose_fleet, sign_in, sign_out
from fleet_server.web.forms import read_form
from fleet_server.web.templating import render

DAY_S = 86_400
router = APIRouter(include_in_schema=False)


@router.get("/")
def root() -> RedirectResponse:
    """Where people begin."""
    return RedirectResponse("/ui", 303)


@router.get("/ui/sign-in")
async def show(request: Request, api: PageApi, next: str = "/ui") -> Response:  # noqa: A002 (the name in the address)
    """The form."""
    return await _form(request, api, next)


@router.post("/ui/sign-in")
async def do(request: Request, api: PageApi) -> Response:
    """Check who it is, and keep their session in the browser."""
    form = await read_form(request)
    token, seconds = form.text("token"), DAY_S
    try:
        if token:
            await _as(request, token).get("/me")
        else:
            body = {"name": form.text("name"), "password": form.text("password")}
            token = (await api.send("POST", "/login", body))["token"]
    except RefusalError as error:
        return await _form(
            request, api, form.text("next"), said=error.problem, status=error.status, with_token=bool(token)
        )
    answer = RedirectResponse(inside(form.text("next")), 303)
    sign_in(answer, token, secure=request.url.scheme == "https", seconds=seconds)
    return answer


@router.post("/ui/sign-out")
async def out(api: PageApi) -> Response:
    """End the session, and forget it here."""
    answer = RedirectResponse("/ui/sign-in", 303)
    try:
        await api.send("POST", "/logout")
    except RefusalError as error:
        if error.status not in {401, 403, 409, 422}:  # an admin's token, or one of OpenID, has no session to end
            raise
    sign_out(answer)
    return answer


@router.post("/ui/fleet")
async def fleet(request: Request) -> Response:
    """Look at another fleet."""
    form = await read_form(request)
    answer = RedirectResponse("/ui", 303)
    choose_fleet(answer, form.text("fleet"), secure=request.url.scheme == "https")
    return answer


def inside(target: str) -> str:
    """An address of this server's pages; the first page for any other."""
    return target if target.startswith("/ui") and not target.startswith("/ui/sign-") and "\\" not in target else "/ui"


def _as(request: Request, token: str) -> Api:
    scope = dict(request.scope)
    kept = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
    scope["headers"] = [*kept, (b"authorization", f"Bearer {token}".encode("latin-1", "replace"))]
    return Api(Request(scope))


async def _form(
    request: Request, api: Api, target: str, *, said: object = None, status: int = 200, with_token: bool = False
) -> Response:
    oidc = (await api.get("/login"))["oidc"]
    return render(request, "sign_in.html", status, next=inside(target), said=said, oidc=oidc, with_token=with_token)
