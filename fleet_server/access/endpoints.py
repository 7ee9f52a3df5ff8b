"""HTTP of the audit log, and the check that stands before every endpoint."""

from __future__ import annotations

from fastapi import APIRouter, Request

from fleet_server.access import repository, service
from fleet_server.access.schemas import AuditEventView
from fleet_server.http import AppSettings, FleetId, Paging, ReadSession, page
from fleet_server.schemas import Page

router = APIRouter(tags=["audit"])


def require_admin(request: Request, settings: AppSettings) -> None:
    """Dependency of every router below `/api/v1`."""
    token = settings.admin_token.get_secret_value() if settings.admin_token else None
    service.check_token(token, request.headers.get("Authorization"))


@router.get("/audit-events", summary="List what was done")
def list_events(session: ReadSession, fleet_id: FleetId, paging: Paging) -> Page[AuditEventView]:
    """Who did what to which thing, newest first."""
    rows = repository.events_page(session, fleet_id, paging)
    return page(rows, paging, AuditEventView.model_validate, key=lambda row: row.id)
