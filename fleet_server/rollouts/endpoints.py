"""HTTP of rollouts and deployments."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, status

from fleet_server.agent_releases import service as releases
from fleet_server.devices import service as device_service
from fleet_server.devices.schemas import DeviceView, HoldRequest, ProfileUpdate, ProfileView
from fleet_server.devices.service import device_view, get_device, get_profile, profile_name, profile_view
from fleet_server.domain.states import RolloutState
from fleet_server.http import (
    Actor,
    AppSettings,
    DeviceId,
    FleetId,
    ProfileName,
    ReadSession,
    RolloutId,
    WriteSession,
)
from fleet_server.openapi import problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.rollouts import (
    approvals,
    bundles,
    comparing,
    desired,
    explaining,
    previewing,
    repository,
    service,
    views,
)
from fleet_server.rollouts.schemas import (
    BundleCreate,
    BundleView,
    DeploymentView,
    PinRequest,
    RolloutAbort,
    RolloutComparison,
    RolloutCreate,
    RolloutDecision,
    RolloutExplanation,
    RolloutPreview,
    RolloutPromote,
    RolloutView,
)
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page

router = APIRouter(tags=["rollouts"], route_class=ApiRoute)
profile_router = APIRouter(
    tags=["profiles"], route_class=ApiRoute
)  # what is changed of a profile and sent to its devices
device_router = APIRouter(
    tags=["devices"], route_class=ApiRoute
)  # what is done to a device and ends its part in rollouts
RolloutPaging = Annotated[PageRequest, Depends(paged(repository.ROLLOUTS))]
DeploymentPaging = Annotated[PageRequest, Depends(paged(repository.DEPLOYMENTS))]
PhaseFilter = Annotated[str | None, Query(description="Only those in this phase, such as `active`.")]


@router.post(
    "/rollouts",
    summary="Create a rollout",
    status_code=status.HTTP_201_CREATED,
    responses=problems(
        "model_not_found",
        "version_not_found",
        "bad_version",
        "profile_not_found",
        "device_not_found",
        "no_device",
        "bad_query",
        "device_without_profile",
        "no_variant_for_profile",
        *("agent_release_not_found", "no_bundle_for_platform", "no_self_update", "no_release_metric"),
        "no_release_exposure",
        "variant_unproven",
        "device_busy",
        "unsigned",
        "trust_keys",
    ),
)
def create_rollout(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, wanted: RolloutCreate
) -> RolloutView:
    """It starts at once: the first stage's devices are told before this answers.

    Where its fleet asks for approvals, it waits for those and nothing is sent before.
    """
    return views.rollout_view(session, service.create(session, settings, fleet_id, wanted, actor=actor))


@router.post(
    "/bundles",
    summary="Order without a server",
    status_code=status.HTTP_201_CREATED,
    responses=problems(
        "model_not_found",
        "version_not_found",
        "bad_version",
        "profile_not_found",
        "approvals_needed",
        "model_twice",
        "bundle_too_large",
        "no_variant_for_profile",
        "variant_unproven",
        "unsigned",
        "trust_keys",
    ),
)
def create_bundle(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, wanted: BundleCreate
) -> BundleView:
    """What devices that no server reaches are to run, as a signed order, for `shoal bundle export` to put into a file.

    It replaces the earlier order of its name. `signed` is false while people have to sign it; ask again when they have.
    """
    return bundles.create(session, settings, fleet_id, wanted, actor=actor)


@router.get(
    "/rollouts",
    summary="List rollouts",
    responses=problems("model_not_found", "version_not_found", "bad_version", "agent_release_not_found"),
)
def list_rollouts(
    session: ReadSession,
    fleet_id: FleetId,
    paging: RolloutPaging,
    state: Annotated[RolloutState | None, Query(description="Only those in this state.")] = None,
    model: Annotated[str | None, Query(description="Only those of this model.")] = None,
    version: Annotated[str | None, Query(description="Only of this `model@version`, or `shoal-agent@version`.")] = None,
) -> Page[RolloutView]:
    """Rollouts, newest first."""
    version_id = releases.resolve(session, fleet_id, version).id if version else None
    rows = repository.rollouts_page(session, fleet_id, paging, state=state, model=model, version_id=version_id)
    shown = views.rollout_views(session, rows.items)
    return page(rows, paging, lambda row: shown[row.id])


@router.get(
    "/rollouts/{rollout_id}",
    summary="Show a rollout",
    responses=problems("rollout_not_found"),
)
def show_rollout(session: ReadSession, fleet_id: FleetId, rollout_id: RolloutId) -> RolloutView:
    """One rollout: where its devices are, and every judgement with its reason."""
    return views.rollout_view(session, service.get_rollout(session, fleet_id, rollout_id))


@router.get(
    "/rollouts/{rollout_id}/deployments",
    summary="List a rollout's deployments",
    responses=problems("rollout_not_found"),
)
def rollout_deployments(
    session: ReadSession, fleet_id: FleetId, paging: DeploymentPaging, rollout_id: RolloutId, phase: PhaseFilter = None
) -> Page[DeploymentView]:
    """One row a device, newest first; a reverted device has a second row that took it back."""
    service.get_rollout(session, fleet_id, rollout_id)
    rows = repository.deployments_page(session, fleet_id, paging, rollout_id=rollout_id, phase=phase)
    return page(rows, paging, views.deployment_view)


@router.post(
    "/rollouts/{rollout_id}/approve",
    summary="Approve a rollout",
    responses=problems(
        "rollout_not_found",
        "approval_not_yours",
        "not_awaiting_approval",
        "bad_transition",
        "artifact_changed",
        "no_device",
        "bad_query",
        "device_not_found",
        "profile_not_found",
        "device_without_profile",
        "no_variant_for_profile",
        *("agent_release_not_found", "no_bundle_for_platform", "no_self_update", "no_release_metric"),
        "no_release_exposure",
        "variant_unproven",
        "device_busy",
        "unsigned",
        "trust_keys",
    ),
)
def approve_rollout(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    rollout_id: RolloutId,
    decision: RolloutDecision,
) -> RolloutView:
    """By another than who created it. With the last approval that is needed it starts, as it was created."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    unchanged.check(session, rollout, lambda: views.rollout_view(session, rollout))
    approvals.approve(session, settings, rollout, decision, actor=actor)
    return views.rollout_view(session, rollout)


@router.post(
    "/rollouts/{rollout_id}/reject",
    summary="Reject a rollout",
    responses=problems("rollout_not_found", "not_awaiting_approval", "bad_transition"),
)
def reject_rollout(
    session: WriteSession,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    rollout_id: RolloutId,
    decision: RolloutDecision,
) -> RolloutView:
    """Ends a rollout that waits for approvals; nothing was sent."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    unchanged.check(session, rollout, lambda: views.rollout_view(session, rollout))
    approvals.reject(session, rollout, decision, actor=actor)
    return views.rollout_view(session, rollout)


@router.post(
    "/rollouts/{rollout_id}/pause",
    summary="Pause a rollout",
    responses=problems("rollout_not_found", "bad_transition"),
)
def pause_rollout(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, rollout_id: RolloutId
) -> RolloutView:
    """No further stage is sent; devices that were told go on."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    unchanged.check(session, rollout, lambda: views.rollout_view(session, rollout))
    service.pause(session, rollout, "asked to pause", actor=actor)
    return views.rollout_view(session, rollout)


@router.post(
    "/rollouts/{rollout_id}/resume",
    summary="Resume a paused rollout",
    responses=problems("rollout_not_found", "bad_transition", "awaiting_approval"),
)
def resume_rollout(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    rollout_id: RolloutId,
) -> RolloutView:
    """Goes on with the stage it was in."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    unchanged.check(session, rollout, lambda: views.rollout_view(session, rollout))
    service.resume(session, settings, rollout, actor=actor)
    return views.rollout_view(session, rollout)


@router.post(
    "/rollouts/{rollout_id}/abort",
    summary="Abort a rollout",
    responses=problems("rollout_not_found", "bad_transition"),
)
def abort_rollout(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    rollout_id: RolloutId,
    how: RolloutAbort,
) -> RolloutView:
    """Ends it; with `revert`, devices go back to what they ran before, and one that succeeded can be reverted too."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    unchanged.check(session, rollout, lambda: views.rollout_view(session, rollout))
    service.abort(session, settings, rollout, revert=how.revert, actor=actor)
    return views.rollout_view(session, rollout)


@router.post(
    "/rollouts/{rollout_id}/promote",
    summary="Let the next stage begin",
    responses=problems("rollout_not_found", "nothing_to_promote"),
)
def promote_rollout(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    rollout_id: RolloutId,
    how: RolloutPromote,
) -> RolloutView:
    """Where it waits for somebody to let it; with `full`, all devices are sent it at once, unwatched."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    unchanged.check(session, rollout, lambda: views.rollout_view(session, rollout))
    service.promote(session, settings, rollout, full=how.full, actor=actor)
    return views.rollout_view(session, rollout)


@router.post(
    "/rollouts/{rollout_id}/retry",
    summary="Try failed devices again",
    responses=problems("rollout_not_found", "nothing_to_retry", "bad_transition"),
)
def retry_rollout(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    rollout_id: RolloutId,
) -> RolloutView:
    """Only those that failed or went back by themselves; one that succeeded runs again until they have settled."""
    rollout = service.get_rollout(session, fleet_id, rollout_id, lock=True)
    unchanged.check(session, rollout, lambda: views.rollout_view(session, rollout))
    service.retry(session, settings, rollout, actor=actor)
    return views.rollout_view(session, rollout)


@router.get("/rollouts/{rollout_id}/explain", summary="Explain a rollout", responses=problems("rollout_not_found"))
def explain_rollout(
    session: ReadSession, settings: AppSettings, fleet_id: FleetId, rollout_id: RolloutId
) -> RolloutExplanation:
    """What it does now and why, where each stop rule stands, and every decision so far."""
    return explaining.explain(session, settings, service.get_rollout(session, fleet_id, rollout_id))


@router.get(
    "/rollouts/{rollout_id}/comparison",
    summary="Compare a rollout's cohort",
    responses=problems("rollout_not_found"),
)
def compare_rollout(session: ReadSession, fleet_id: FleetId, rollout_id: RolloutId) -> RolloutComparison:
    """What its devices did with the version and with the one before, by profile, with 95 % confidence intervals."""
    return comparing.compare(session, service.get_rollout(session, fleet_id, rollout_id))


@router.post(
    "/rollouts/dry-run",
    summary="Preview a rollout",
    responses=problems(
        "model_not_found",
        "version_not_found",
        "bad_version",
        "profile_not_found",
        "device_not_found",
        "no_device",
        "bad_query",
        *("agent_release_not_found", "no_release_metric", "no_release_exposure"),
    ),
)
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
    paging: DeploymentPaging,
    device: Annotated[str | None, Query(description="Only this device's.")] = None,
    model: Annotated[str | None, Query(description="Only of this model.")] = None,
    phase: PhaseFilter = None,
) -> Page[DeploymentView]:
    """What devices were told to run, newest first."""
    rows = repository.deployments_page(session, fleet_id, paging, device_id=device, model=model, phase=phase)
    return page(rows, paging, views.deployment_view)


@profile_router.patch(
    "/profiles/{name}",
    summary="Change how artifacts come to a profile's devices",
    responses=problems("profile_not_found"),
)
def change_profile(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    name: ProfileName,
    change: ProfileUpdate,
) -> ProfileView:
    """Its devices are told before this answers: one that waits for a window goes on when the new policy lets it."""
    row = get_profile(session, fleet_id, name)
    unchanged.check(session, row, lambda: profile_view(row))
    return profile_view(desired.change_profile(session, settings, fleet_id, name, change, actor=actor))


@device_router.post("/devices/{device_id}/hold", summary="Hold a device back", responses=problems("device_not_found"))
def hold_device(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, device_id: DeviceId, wanted: HoldRequest
) -> DeviceView:
    """No rollout sends it anything until it is released; what it runs goes on, and can be taken back."""
    device = get_device(session, fleet_id, device_id)
    unchanged.check(session, device, lambda: device_view(device, profile_name(session, device)))
    device_service.hold_device(session, fleet_id, device_id, wanted.reason, actor=actor)
    return device_view(device, profile_name(session, device))


@device_router.post("/devices/{device_id}/release", summary="Release a device", responses=problems("device_not_found"))
def release_device(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, device_id: DeviceId
) -> DeviceView:
    """Rollouts that wait for it go on with it at their next tick."""
    device = get_device(session, fleet_id, device_id)
    unchanged.check(session, device, lambda: device_view(device, profile_name(session, device)))
    device_service.release_device(session, fleet_id, device_id, actor=actor)
    return device_view(device, profile_name(session, device))


@device_router.post(
    "/devices/{device_id}/pin",
    summary="Pin a device to a version",
    status_code=status.HTTP_201_CREATED,
    responses=problems(
        "device_not_found",
        "model_not_found",
        "version_not_found",
        "bad_version",
        "approvals_needed",
        "device_without_profile",
        "no_variant_for_profile",
        *("agent_release_not_found", "no_bundle_for_platform", "no_self_update", "no_release_metric"),
        "no_release_exposure",
        "variant_unproven",
        "unsigned",
        "trust_keys",
    ),
)
def pin_device(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    device_id: DeviceId,
    wanted: PinRequest,
) -> RolloutView:
    """Sends it that version, by a rollout of its own, and holds it: no other rollout moves it until it is released."""
    device = get_device(session, fleet_id, device_id)
    unchanged.check(session, device, lambda: device_view(device, profile_name(session, device)))
    return views.rollout_view(session, service.pin(session, settings, fleet_id, device_id, wanted, actor=actor))


@device_router.delete(
    "/devices/{device_id}",
    summary="Forget a device",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("device_not_found", "device_online"),
)
def forget_device(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    device_id: DeviceId,
) -> None:
    """Only one that is offline. No list and no rollout sees it; its history stays.

    What it was still to do in rollouts ends. When it connects again it is back, with its tags and no model.
    """
    row = get_device(session, fleet_id, device_id)
    unchanged.check(session, row, lambda: device_view(row, profile_name(session, row)))
    service.forget_device(session, settings, fleet_id, device_id, actor=actor)
