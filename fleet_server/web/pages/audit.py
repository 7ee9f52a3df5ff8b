"""The audit log: who did what, and whether it is whole."""

from __future__ import annotations

from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import Response

from fleet_server.web.api import PageApi
from fleet_server.web.templating import render

router = APIRouter(include_in_schema=False)


@router.get("/ui/audit")
async def audit(
    request: Request,
    api: PageApi,
    actor: str = "",
    action: str = "",
    subject: str = "",
    cursor: str = "",
    verify: str = "",
) -> Response:
    """The events, newest first; the chain of their hashes checked where that is asked for."""
    filters = {"actor": actor, "action": action, "subject": subject}
    page = await api.get("/audit-events", cursor=cursor, limit=50, **filters)
    checked = await api.get("/audit-events/verify") if verify else None
    base = f"/ui/audit?{urlencode({name: value for name, value in filters.items() if value})}"
    return render(request, "audit.html", page=page, filters=filters, base=base, checked=checked)
