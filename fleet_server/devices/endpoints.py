"""HTTP of devices and profiles."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, status

from fleet_server.devices import repository, service
from fleet_server.devices.schemas import DeviceUpdate, DeviceView, ProfileCreate, ProfileView
from fleet_server.http import Actor, DeviceId, FleetId, ProfileName, ReadSession, WriteSession
from fleet_server.openapi import problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page

router = APIRouter(route_class=ApiRoute)
DevicePaging = Annotated[PageRequest, Depends(paged(repository.DEVICES))]
ProfilePaging = Annotated[PageRequest, Depends(paged(repository.PROFILES))]


@router.get(
    "/devices",
    tags=["devices"],
    summary="List devices",
    responses=problems("bad_query"),
)
def list_devices(
    session: ReadSession,
    fleet_id: FleetId,
    paging: DevicePaging,
    profile: Annotated[str | None, Query(description="Only devices of this profile.")] = None,
    online: Annotated[bool | None, Query(description="Only those that are, or are not, connected.")] = None,
    query: Annotated[
        str | None,
        Query(
            max_length=4096,
            description="Only devices it holds for, in RSQL: `site==plant7;accelerator==cuda`, `memory_mb>=2048`, "
            "`id==cam-*`. Names that are no attributes are tags.",
        ),
    ] = None,
) -> Page[DeviceView]:
    """Every device that ever connected, by id."""
    condition = service.query_condition(session, fleet_id, query, field="query") if query is not None else None
    rows = repository.devices_page(session, fleet_id, paging, profile=profile, online=online, condition=condition)
    return page(rows, paging, lambda row: service.device_view(*row))


@router.get(
    "/devices/{device_id}",
    tags=["devices"],
    summary="Show a device",
    responses=problems("device_not_found"),
)
def show_device(session: ReadSession, fleet_id: FleetId, device_id: DeviceId) -> DeviceView:
    """One device: its facts, its profile, and what truly answers requests on it."""
    device = service.get_device(session, fleet_id, device_id)
    return service.device_view(device, service.profile_name(session, device))


@router.patch(
    "/devices/{device_id}",
    tags=["devices"],
    summary="Tag a device or pin its profile",
    responses=problems("device_not_found", "profile_not_found"),
)
def change_device(
    session: WriteSession,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    device_id: DeviceId,
    change: DeviceUpdate,
) -> DeviceView:
    """Fields that are absent stay as they are; `profile: null` lets the device match again."""
    row = service.get_device(session, fleet_id, device_id)
    unchanged.check(session, row, lambda: show_device(session, fleet_id, device_id))
    device = service.update_device(session, fleet_id, device_id, change, actor=actor)
    return service.device_view(device, service.profile_name(session, device))


@router.get("/profiles", tags=["profiles"], summary="List profiles")
def list_profiles(session: ReadSession, fleet_id: FleetId, paging: ProfilePaging) -> Page[ProfileView]:
    """Every profile, by name."""
    rows = repository.profiles_page(session, fleet_id, paging)
    return page(rows, paging, service.profile_view)


@router.post(
    "/profiles",
    tags=["profiles"],
    summary="Create a profile",
    status_code=status.HTTP_201_CREATED,
    responses=problems("profile_exists", "unknown_runtime"),
)
def create_profile(session: WriteSession, fleet_id: FleetId, actor: Actor, wanted: ProfileCreate) -> ProfileView:
    """Devices that are not pinned match again at once: the profile with most conditions that hold wins."""
    return service.profile_view(service.create_profile(session, fleet_id, wanted, actor=actor))


@router.get(
    "/profiles/{name}",
    tags=["profiles"],
    summary="Show a profile",
    responses=problems("profile_not_found"),
)
def show_profile(session: ReadSession, fleet_id: FleetId, name: ProfileName) -> ProfileView:
    """One profile, with how many devices have it."""
    profile = service.get_profile(session, fleet_id, name)
    return service.profile_view(profile, repository.devices_of_profile(session, fleet_id, profile.id))


@router.delete(
    "/profiles/{name}",
    tags=["profiles"],
    summary="Delete a profile",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("profile_not_found", "profile_in_use"),
)
def delete_profile(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, name: ProfileName
) -> None:
    """Only one that no variant was built for."""
    row = service.get_profile(session, fleet_id, name)
    unchanged.check(session, row, lambda: show_profile(session, fleet_id, name))
    service.delete_profile(session, fleet_id, name, actor=actor)
