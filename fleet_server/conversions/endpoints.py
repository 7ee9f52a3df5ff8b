"""HTTP of building variants."""

from __future__ import annotations

from fastapi import APIRouter, status

from fleet_server.catalog.schemas import VariantBuild, VariantView
from fleet_server.catalog.service import get_variant
from fleet_server.conversions import service
from fleet_server.http import Actor, FleetId, WriteSession
from fleet_server.openapi import problems

router = APIRouter(tags=["variants"])


@router.post("/variants", summary="Build variants", status_code=status.HTTP_202_ACCEPTED, responses=problems(404, 409))
def build_variants(session: WriteSession, fleet_id: FleetId, actor: Actor, wanted: VariantBuild) -> list[VariantView]:
    """One variant a profile; follow each at `/variants/{id}` until it is `ready`, `refused` or `failed`."""
    ids = service.request_builds(session, fleet_id, wanted, actor=actor)
    return [get_variant(session, fleet_id, variant_id) for variant_id in ids]
