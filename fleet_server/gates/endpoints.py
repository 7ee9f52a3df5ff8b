"""HTTP of gate runs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, status

from fleet_server.catalog import repository as catalog
from fleet_server.catalog.service import resolve_version
from fleet_server.gates import repository, service
from fleet_server.gates.schemas import GateRunCreate, GateRunState, GateRunView
from fleet_server.http import Actor, AppSettings, FleetId, ReadSession, WriteSession
from fleet_server.openapi import problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page

router = APIRouter(tags=["gate runs"], route_class=ApiRoute)
RunPaging = Annotated[PageRequest, Depends(paged(repository.RUNS))]
RunId = Annotated[str, Path(description="The gate run's id.")]


@router.post(
    "/gate-runs",
    summary="Measure a variant on devices",
    status_code=status.HTTP_201_CREATED,
    responses=problems(
        "model_not_found",
        "version_not_found",
        "bad_version",
        "profile_not_found",
        "device_not_found",
        "variant_not_built",
        "gate_running",
        "no_evaluation",
        "evaluation_too_large",
        "no_device_online",
        "wrong_profile",
        "device_offline",
        "unsigned",
        "trust_keys",
    ),
)
def create_gate_run(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, wanted: GateRunCreate
) -> GateRunView:
    """Its candidates go to devices of the profile, which measure them beside what they serve.

    Then the best one by those measurements is picked, and the gate judges it. A candidate slower than fp32, over a
    budget, or that fell back from an accelerator to the processor, is refused.
    """
    return service.run_view(session, service.start(session, settings, fleet_id, wanted, actor=actor))


@router.get(
    "/gate-runs",
    summary="List gate runs",
    responses=problems("model_not_found", "version_not_found", "bad_version"),
)
def list_gate_runs(
    session: ReadSession,
    fleet_id: FleetId,
    paging: RunPaging,
    version: Annotated[str | None, Query(description="Only of this `model@version`.")] = None,
    state: Annotated[GateRunState | None, Query(description="Only those in this state.")] = None,
) -> Page[GateRunView]:
    """Gate runs, newest first."""
    variants = None
    if version is not None:
        variants = catalog.variant_ids(session, resolve_version(session, fleet_id, version).id)
    rows = repository.runs_page(session, fleet_id, paging, variant_ids=variants, state=state)
    return page(rows, paging, lambda row: service.run_view(session, row))


@router.get(
    "/gate-runs/{run_id}",
    summary="Show a gate run",
    responses=problems("gate_run_not_found"),
)
def show_gate_run(session: ReadSession, fleet_id: FleetId, run_id: RunId) -> GateRunView:
    """One gate run: what each device measured of each candidate, and the verdict."""
    return service.run_view(session, service.get_run(session, fleet_id, run_id))


@router.post(
    "/gate-runs/{run_id}/cancel",
    summary="Cancel a gate run",
    responses=problems("gate_run_not_found", "gate_run_over"),
)
def cancel_gate_run(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    run_id: RunId,
) -> GateRunView:
    """Its devices stop measuring; the variant is as it was."""
    run = service.get_run(session, fleet_id, run_id)
    unchanged.check(session, run, lambda: service.run_view(session, run))
    return service.run_view(session, service.cancel(session, settings, fleet_id, run_id, actor=actor))
