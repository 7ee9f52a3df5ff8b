"""HTTP of releases of the agent."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, status

from fleet_server.agent_releases import repository, service
from fleet_server.agent_releases.schemas import AgentReleaseCreate, AgentReleaseView
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.http import Actor, AppSettings, Db, FleetId, ReadSession
from fleet_server.openapi import problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page

router = APIRouter(tags=["agent releases"], route_class=ApiRoute)
Paging = Annotated[PageRequest, Depends(paged(repository.RELEASES))]
ReleaseVersion = Annotated[str, Path(description="The release's version.", examples=["0.2.0"])]


def _store(request: Request) -> ArtifactStore:
    store: ArtifactStore = request.app.state.artifacts
    return store


Store = Annotated[ArtifactStore, Depends(_store)]


@router.post(
    "/agent-releases",
    summary="Push a release of the agent",
    status_code=status.HTTP_201_CREATED,
    responses=problems("upload_not_found", "bad_release", "release_exists", "name_taken", "artifact_store"),
)
def create_agent_release(
    database: Db, store: Store, settings: AppSettings, fleet_id: FleetId, actor: Actor, wanted: AgentReleaseCreate
) -> AgentReleaseView:
    """The bundle of one platform; a release has one for each. It is rolled out as `shoal-agent@version`."""
    return service.push(database, store, settings, fleet_id, wanted.digest, actor=actor)


@router.get("/agent-releases", summary="List releases of the agent")
def list_agent_releases(session: ReadSession, fleet_id: FleetId, paging: Paging) -> Page[AgentReleaseView]:
    """Releases, newest first."""
    rows = repository.page_of(session, fleet_id, paging)
    shown = service.views(session, fleet_id, rows.items)
    return page(rows, paging, lambda row: shown[row.id])


@router.get(
    "/agent-releases/{version}",
    summary="Show a release of the agent",
    responses=problems("agent_release_not_found"),
)
def show_agent_release(session: ReadSession, fleet_id: FleetId, version: ReleaseVersion) -> AgentReleaseView:
    """One release: its bundles, and how many devices run it."""
    return service.view(session, service.get(session, fleet_id, version))


@router.delete(
    "/agent-releases/{version}",
    summary="Delete a release of the agent",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("agent_release_not_found", "version_in_use", "artifact_store"),
)
def delete_agent_release(
    database: Db,
    store: Store,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    version: ReleaseVersion,
) -> None:
    """Only one that was never rolled out: its bundles go with it."""
    service.delete(database, store, fleet_id, version, actor=actor, unchanged=unchanged)
