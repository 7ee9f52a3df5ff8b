"""HTTP of building variants."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, status

from converters.architectures import registered
from fleet_server.catalog.schemas import ArchitectureView, VariantBuild, VariantView
from fleet_server.catalog.service import get_variant
from fleet_server.clock import utc_now
from fleet_server.conversions import service
from fleet_server.http import Actor, FleetId, VariantId, WriteSession
from fleet_server.models import Variant
from fleet_server.openapi import problems
from fleet_server.paging import ComputedList, PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page

router = APIRouter(route_class=ApiRoute)
ARCHITECTURES = ComputedList[str](str, {"name": str}, default="name")


@router.get("/architectures", tags=["models"], summary="List architectures")
def list_architectures(
    paging: Annotated[PageRequest, Depends(paged(ARCHITECTURES))],
) -> Page[ArchitectureView]:
    """Nets whose code is installed on the server: weights of theirs may be pushed as safetensors, and trained here."""
    return page(ARCHITECTURES.page(registered(), paging), paging, lambda name: ArchitectureView(name=name))


@router.post(
    "/variants",
    tags=["variants"],
    summary="Build variants",
    status_code=status.HTTP_202_ACCEPTED,
    responses=problems(
        "model_not_found",
        "version_not_found",
        "bad_version",
        "profile_not_found",
        "variant_deployed",
        "gate_running",
        "not_trainable",
    ),
)
def build_variants(session: WriteSession, fleet_id: FleetId, actor: Actor, wanted: VariantBuild) -> list[VariantView]:
    """One variant a profile; follow each at `/variants/{id}` until it is no longer `queued` or `building`."""
    ids = service.request_builds(session, fleet_id, wanted, actor=actor)
    return [get_variant(session, fleet_id, variant_id) for variant_id in ids]


@router.post(
    "/variants/{variant_id}/cancel",
    tags=["variants"],
    summary="Cancel the build of a variant",
    responses=problems("variant_not_found", "not_building"),
)
def cancel_build(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, variant_id: VariantId
) -> VariantView:
    """Its worker is ended within a second or two; 409 when the variant is not being built."""
    get_variant(session, fleet_id, variant_id)
    row = session.get_one(Variant, variant_id)
    unchanged.check(session, row, lambda: get_variant(session, fleet_id, variant_id))
    service.cancel(session, fleet_id, variant_id, utc_now(), actor=actor)
    return get_variant(session, fleet_id, variant_id)
