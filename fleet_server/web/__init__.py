"""Pages for people: the dashboard below `/ui`, and the API's own page, from files that lie here: no internet is needed.

`static/swagger-ui` holds swagger-ui-dist 5.35.0 as published, under its licence (Apache-2.0), without source maps, its
program packed by gzip; `static/vendor` holds htmx.org, htmx-ext-sse and uPlot as published, each with its licence and
its version in its name.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from fleet_server.web import live
from fleet_server.web.api import RefusalError, segment
from fleet_server.web.cookies import CookieSessions
from fleet_server.web.pages import (
    access,
    agent_releases,
    alert_routes,
    alert_rules,
    alerts,
    audit,
    commands,
    devices,
    drift,
    models,
    overview,
    rollouts,
    samples,
    sign_in,
)
from fleet_server.web.static_files import PackedFiles
from fleet_server.web.templating import render

STATIC = Path(__file__).parent / "static"
_INLINE = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def add_pages(app: FastAPI) -> None:
    """Serve the dashboard, `/docs` and what they need."""
    app.mount("/static", PackedFiles(directory=STATIC), name="static")
    pages = (sign_in, overview, commands, devices, models, rollouts, agent_releases, samples, drift, audit)
    for part in (*pages, access, alerts, alert_rules, alert_routes, live):
        app.include_router(part.router)
    app.state.page_looks = live.Looks()
    app.add_exception_handler(RefusalError, _refused)
    app.add_middleware(CookieSessions)

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url=app.openapi_url or "/openapi.json",
            title=f"{app.title}: API",
            swagger_js_url="/static/swagger-ui/swagger-ui-bundle.js",
            swagger_css_url="/static/swagger-ui/swagger-ui.css",
            swagger_favicon_url="/static/swagger-ui/favicon-32x32.png",
            swagger_ui_parameters={"docExpansion": "list", "defaultModelsExpandDepth": 0, "tryItOutEnabled": False},
        )
        page.headers["Content-Security-Policy"] = _policy(bytes(page.body).decode())
        return page


async def _refused(request: Request, error: Exception) -> Response:
    """What a page says when the API refuses what it needs: who is not signed in, signs in."""
    assert isinstance(error, RefusalError)
    if error.status != 401:
        headings = {403: "Not yours to see", 404: "Not found"}
        heading = headings.get(error.status, "That did not work")
        return render(request, "problem.html", error.status, heading=heading, said=error.problem)
    target = f"{request.url.path}?{request.url.query}" if request.url.query else request.url.path
    wanted = f"/ui/sign-in?next={segment(target)}" if request.method == "GET" else "/ui/sign-in"
    if "hx-request" in request.headers:
        return Response(status_code=204, headers={"HX-Redirect": "/ui/sign-in"})
    return RedirectResponse(wanted, 303)


def _policy(html: str) -> str:
    """Scripts and requests of this server alone, and the one script that is written in the page, by its hash."""
    inline = (hashlib.sha256(script.encode()).digest() for script in _INLINE.findall(html))
    scripts = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in inline)
    return (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
