"""HTTP of shard plans."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, status

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.service import Inspector
from fleet_server.http import Actor, Db, FleetId, ReadSession, WriteSession
from fleet_server.openapi import problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Name, Page
from fleet_server.shards import repository, service
from fleet_server.shards.schemas import PlanState, ShardPlanCreate, ShardPlanView

router = APIRouter(tags=["models"], route_class=ApiRoute)
PlanPaging = Annotated[PageRequest, Depends(paged(repository.PLANS))]
PlanId = Annotated[str, Path(description="The shard plan's id.")]


def _parts(request: Request) -> tuple[ArtifactStore, Inspector, service.Sharder]:
    state = request.app.state
    return state.artifacts, state.inspector, state.sharder


Parts = Annotated[tuple[ArtifactStore, Inspector, service.Sharder], Depends(_parts)]


@router.post(
    "/shard-plans",
    summary="Cut a version into stages",
    status_code=status.HTTP_201_CREATED,
    responses=problems(
        *("model_not_found", "version_not_found", "bad_version", "bad_query", "no_device", "too_many_devices"),
        *("not_shardable", "no_plan", "stages_differ", "name_too_long", "bad_model", "bad_data", "timeout"),
        *("worker_died", "worker_failed", "out_of_memory", "artifact_store", "artifact_missing", "artifact_damaged"),
        *("version_exists", "upload_not_found", "duplicate_format", "disk_full"),
    ),
)
def create_shard_plan(
    database: Db, parts: Parts, fleet_id: FleetId, actor: Actor, wanted: ShardPlanCreate
) -> ShardPlanView:
    """Chosen by compute, memory of each device and bytes over each link; stages are compared with the whole.

    Each stage becomes a version of a model of its own (`NAME.stage-1-of-3`), is built, signed and rolled out as any
    other, and goes to another device when its own is lost.
    """
    store, inspector, sharder = parts
    return service.create(database, store, inspector, sharder, fleet_id=fleet_id, wanted=wanted, actor=actor)


@router.get("/shard-plans", summary="List shard plans")
def list_shard_plans(
    session: ReadSession,
    fleet_id: FleetId,
    paging: PlanPaging,
    model: Annotated[Name | None, Query(description="Only of this model.")] = None,
    state: Annotated[PlanState | None, Query(description="Only those in this state.")] = None,
) -> Page[ShardPlanView]:
    """Shard plans, newest first."""
    rows = repository.plans_page(session, fleet_id, paging, model=model, state=state)
    return page(rows, paging, lambda row: service.plan_view(session, row))


@router.get("/shard-plans/{plan_id}", summary="Show a shard plan", responses=problems("shard_plan_not_found"))
def show_shard_plan(session: ReadSession, fleet_id: FleetId, plan_id: PlanId) -> ShardPlanView:
    """One plan: its stages, their devices, and what it waits for."""
    return service.plan_view(session, service.get_plan(session, fleet_id, plan_id))


@router.delete(
    "/shard-plans/{plan_id}",
    summary="Delete a shard plan",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("shard_plan_not_found"),
)
def delete_shard_plan(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, plan_id: PlanId
) -> None:
    """Nobody looks after its stages any more; they stay on their devices, as any model does."""
    service.delete(session, fleet_id, plan_id, actor=actor, unchanged=unchanged)
