"""HTTP of rollouts and deployments."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, status

from fleet_server.devices import service as device_service
from fleet_server.devices.schemas import DeviceView, HoldRequest, ProfileUpdate, ProfileView
from fleet_server.devices.service import profile_view
from fleet_server.domain.states import RolloutState
from fleet_server.http import (
    Actor,
    AppSettings,
    DeviceId,
    FleetId,
    Paging,
    ProfileName,
    ReadSession,
    RolloutId,
    WriteSession,
    page,
)
from fleet_server.openapi import problems
from fleet_server.rollouts import approvals, bundles, desired, explaining, previewing, repository, service, views
from fleet_server.rollouts.schemas import (
    BundleCreate,
    BundleView,
    DeploymentView,
    PinRequest,
    RolloutAbort,
    RolloutCreate,
    RolloutDecision,
    RolloutExplanation,
    RolloutPreview,
    RolloutPromote,
    RolloutView,
)
from fleet_server.schemas import Page

router = APIRouter(tags=["rollouts"])
profile_router = APIRouter(tags=["profiles"])  # what is changed of a profile and sent to its devices
device_router = APIRouter(tags=["devices"])  # what is done to a device and ends its part in rollouts


@router.post("/rollouts", summary="Create a rollout", status_code=status.HTTP_201_CREATED, responses=problems(404, 409))
def create_rollout(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, wanted: RolloutCreate
) -> RolloutView:
    """It starts at once: the first stage's devices are told before this answers.

    Where its fleet asks for approvals, it waits for those and nothing is sent before.
    """
    return views.rollout_view(session, service.create(session, settings, fleet_id, wanted, actor=actor))


@router.post(
    "/bundles", summary="Order without a server", status_code=status.HTTP_201_CREATED, responses=problems(404, 409)
)
def create_bundle(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, wanted: BundleCreate
) -> BundleView:
    """What devices that no server reaches are to run, as a signed order, for `shoal bundle export` to put into a file.

    It replaces the earlier order of its name. `signed` is false while people have to sign it; ask again when they have.
    """
    return bundles.create(session, settings, fleet_id, wanted, actor=actor)


@router.get("/rollouts", summary="List rollouts")
def list_rollouts(
    session: ReadSession,
    fleet_id: FleetId,
    paging: Paging,
    state: Annotated[RolloutState | None, Query(description="Only those in this state.")] = None,
    model: Annotated[str | None, Query(description="Only those of this model.")] = None,
) -> Page[RolloutView]:
    """Rollouts, newest first."""
    rows = repository.rollouts_page(session, fleet_id, paging, state=state, model=model)
    return page(rows, paging, lambda row: views.rollout_view(session, row), key=lambda row: row.id)


@router.get("/rollouts/{rollout_id}", summary="Show a rollout", responses=problems(404))
def show_rollout(session: ReadSession, fleet_id: FleetId, rollout_id: RolloutId) -> RolloutView:
    """One rollout: where its devices are, and every judgement with its reason."""
    return views.rollout_view(session, service.get_rollout(session, fleet_id, rollout_id))


@router.get("/rollouts/{rollout_id}/deployments", summary="List a rollout's deployments", responses=problems(404))
def rollout_deployments(
    session: ReadSession, fleet_id: FleetId, paging: Paging, rollout_id: RolloutId
) -> Page[DeploymentView]:
    """One row a device, newest first; a reverted device has a second row that took it back."""
    service.get_rollout(session, fleet_id, rollout_id)
    rows = repository.deployments_page(session, fleet_id, paging, rollout_id=rollout_id)
    return page(rows, paging, views.deployment_view, key=lambda row: row[0].id)


@router.post("/rollouts/{rollout_id}/approve", summary="Approve a rollout", responses=problems(404, 409))
def approve_rollout(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    rollout_id: RolloutId,
    decision: RolloutDecision,
) -> RolloutView:
    """By another than who created it. With the last approval that is needed it starts, as it was created."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    approvals.approve(session, settings, rollout, decision, actor=actor)
    return views.rollout_view(session, rollout)


@router.post("/rollouts/{rollout_id}/reject", summary="Reject a rollout", responses=problems(404, 409))
def reject_rollout(
    session: WriteSession, fleet_id: FleetId, actor: Actor, rollout_id: RolloutId, decision: RolloutDecision
) -> RolloutView:
    """Ends a rollout that waits for approvals; nothing was sent."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    approvals.reject(session, rollout, decision, actor=actor)
    return views.rollout_view(session, rollout)


@router.post("/rollouts/{rollout_id}/pause", summary="Pause a rollout", responses=problems(404, 409))
def pause_rollout(session: WriteSession, fleet_id: FleetId, actor: Actor, rollout_id: RolloutId) -> RolloutView:
    """No further stage is sent; devices that were told go on."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    service.pause(session, rollout, "asked to pause", actor=actor)
    return views.rollout_view(session, rollout)


@router.post("/rollouts/{rollout_id}/resume", summary="Resume a paused rollout", responses=problems(404, 409))
def resume_rollout(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, rollout_id: RolloutId
) -> RolloutView:
    """Goes on with the stage it was in."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    service.resume(session, settings, rollout, actor=actor)
    return views.rollout_view(session, rollout)


@router.post("/rollouts/{rollout_id}/abort", summary="Abort a rollout", responses=problems(404, 409))
def abort_rollout(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    rollout_id: RolloutId,
    how: RolloutAbort,
) -> RolloutView:
    """Ends it; with `revert`, devices go back to what they ran before, and one that succeeded can be reverted too."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    service.abort(session, settings, rollout, revert=how.revert, actor=actor)
    return views.rollout_view(session, rollout)


@router.post("/rollouts/{rollout_id}/promote", summary="Let the next stage begin", responses=problems(404, 409))
def promote_rollout(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    rollout_id: RolloutId,
    how: RolloutPromote,
) -> RolloutView:
    """Where it waits for somebody to let it; with `full`, all devices are sent it at once, unwatched."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    service.promote(session, settings, rollout, full=how.full, actor=actor)
    return views.rollout_view(session, rollout)


@router.post("/rollouts/{rollout_id}/retry", summary="Try failed devices again", responses=problems(404, 409))
def retry_rollout(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, rollout_id: RolloutId
) -> RolloutView:
    """Only those that failed or went back by themselves; one that succeeded runs again until they have settled."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    service.retry(session, settings, rollout, actor=actor)
    return views.rollout_view(session, rollout)


@router.get("/rollouts/{rollout_id}/explain", summary="Explain a rollout", responses=problems(404))
def explain_rollout(
    session: ReadSession, settings: AppSettings, fleet_id: FleetId, rollout_id: RolloutId
) -> RolloutExplanation:
    """What it does now and why, where each stop rule stands, and every decision so far."""
    return explaining.explain(session, settings, service.get_rollout(session, fleet_id, rollout_id))


@router.post("/rollouts/dry-run", summary="Preview a rollout", responses=problems(404, 409))
def preview_rollout(session: ReadSession, fleet_id: FleetId, wanted: RolloutCreate) -> RolloutPreview:
    """What a rollout would do and what is in its way. Nothing changes."""
    return previewing.preview(session, fleet_id, wanted)


@router.get("/schemas/rollout", summary="Schema of a rollout's file")
def rollout_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of what creates a rollout: for editors, and for checks before anything is sent."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RolloutCreate.model_json_schema()}


@router.get("/deployments", summary="List deployments")
def list_deployments(
    session: ReadSession,
    fleet_id: FleetId,
    paging: Paging,
    device: Annotated[str | None, Query(description="Only this device's.")] = None,
    model: Annotated[str | None, Query(description="Only of this model.")] = None,
) -> Page[DeploymentView]:
    """What devices were told to run, newest first."""
    rows = repository.deployments_page(session, fleet_id, paging, device_id=device, model=model)
    return page(rows, paging, views.deployment_view, key=lambda row: row[0].id)


@profile_router.patch(
    "/profiles/{name}", summary="Change how artifacts come to a profile's devices", responses=problems(404)
)
def change_profile(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    name: ProfileName,
    change: ProfileUpdate,
) -> ProfileView:
    """Its devices are told before this answers: one that waits for a window goes on when the new policy lets it."""
    return profile_view(desired.change_profile(session, settings, fleet_id, name, change, actor=actor))


@device_router.put("/devices/{device_id}/hold", summary="Hold a device back", responses=problems(404))
def hold_device(
    session: WriteSession, fleet_id: FleetId, actor: Actor, device_id: DeviceId, wanted: HoldRequest
) -> DeviceView:
    """No rollout sends it anything until it is released; what it runs goes on, and can be taken back."""
    device = device_service.hold_device(session, fleet_id, device_id, wanted.reason, actor=actor)
    return device_service.device_view(device, device_service.profile_name(session, device))


@device_router.delete("/devices/{device_id}/hold", summary="Release a device", responses=problems(404))
def release_device(session: WriteSession, fleet_id: FleetId, actor: Actor, device_id: DeviceId) -> DeviceView:
    """Rollouts that wait for it go on with it at their next tick."""
    device = device_service.release_device(session, fleet_id, device_id, actor=actor)
    return device_service.device_view(device, device_service.profile_name(session, device))


@device_router.post(
    "/devices/{device_id}/pin",
    summary="Pin a device to a version",
    status_code=status.HTTP_201_CREATED,
    responses=problems(404, 409),
)
def pin_device(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    device_id: DeviceId,
    wanted: PinRequest,
) -> RolloutView:
    """Sends it that version, by a rollout of its own, and holds it: no other rollout moves it until it is released."""
    return views.rollout_view(session, service.pin(session, settings, fleet_id, device_id, wanted, actor=actor))


@device_router.delete(
    "/devices/{device_id}",
    summary="Forget a device",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems(404, 409),
)
def forget_device(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, device_id: DeviceId
) -> None:
    """Only one that is offline. No list and no rollout sees it; its history stays.

    What it was still to do in rollouts ends. When it connects again it is back, with its tags and no model.
    """
    service.forget_device(session, settings, fleet_id, device_id, actor=actor)
