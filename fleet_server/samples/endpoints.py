"""HTTP of samples."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, status
from fastapi.responses import StreamingResponse

from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.downloads import artifact_answer
from fleet_server.http import Actor, AppSettings, FleetId, ModelName, ReadSession, WriteSession
from fleet_server.openapi import problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.routes import ApiRoute
from fleet_server.samples import repository, service
from fleet_server.samples.schemas import (
    SAMPLES_FOLDER,
    RequestState,
    SampleRequestCreate,
    SampleRequestView,
    SampleSetDetail,
    SampleSetView,
    SamplingRuleView,
    SamplingSpec,
)
from fleet_server.schemas import Page

router = APIRouter(tags=["samples"], route_class=ApiRoute)
RulePaging = Annotated[PageRequest, Depends(paged(repository.RULES))]
RequestPaging = Annotated[PageRequest, Depends(paged(repository.REQUESTS))]
SetPaging = Annotated[PageRequest, Depends(paged(repository.SETS))]
RuleProfile = Annotated[str, Path(description="The profile's name.", examples=["rpi5-litert"])]
SampleRequestId = Annotated[str, Path(description="The request's id.")]
SampleSetId = Annotated[str, Path(description="The set's id: that of the upload that brought it.")]
RULE = "/models/{model}/sampling-rules/{name}"


def _store(request: Request) -> ArtifactStore:
    artifacts: ArtifactStore = request.app.state.artifacts
    return artifacts.below(SAMPLES_FOLDER)


Store = Annotated[ArtifactStore, Depends(_store)]


@router.get("/sampling-rules", summary="List which samples are kept")
def list_sampling_rules(session: ReadSession, fleet_id: FleetId, paging: RulePaging) -> Page[SamplingRuleView]:
    """Rules, one a model and a profile. Where there is none, devices keep nothing of what a model is asked."""
    rows = repository.rules_page(session, fleet_id, paging)
    return page(rows, paging, lambda row: service.rule_view(*row))


@router.get(RULE, summary="Show which samples are kept", responses=problems("sampling_rule_not_found"))
def show_sampling_rule(
    session: ReadSession, fleet_id: FleetId, model: ModelName, name: RuleProfile
) -> SamplingRuleView:
    """What devices of the profile keep of the model."""
    return service.rule_view(service.get_rule(session, fleet_id, model, name), model, name)


@router.put(RULE, summary="Keep samples", responses=problems("model_not_found", "profile_not_found"))
def set_sampling_rule(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    model: ModelName,
    name: RuleProfile,
    spec: SamplingSpec,
) -> SamplingRuleView:
    """Devices of the profile, whose own configuration allows it, keep the rows that the model was least sure of."""
    row = repository.rule(session, fleet_id, model, name)
    if row is not None:
        unchanged.check(session, row, lambda: service.rule_view(row, model, name))
    return service.set_rule(session, settings, fleet_id, model, name, spec, actor=actor)


@router.delete(
    RULE,
    summary="Keep samples no more",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("sampling_rule_not_found"),
)
def delete_sampling_rule(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    model: ModelName,
    name: RuleProfile,
) -> None:
    """Devices of the profile delete what they keep of the model; what they sent stays."""
    row = service.get_rule(session, fleet_id, model, name)
    unchanged.check(session, row, lambda: service.rule_view(row, model, name))
    service.remove_rule(session, settings, row, model, name, actor=actor)


@router.post(
    "/sample-requests",
    summary="Ask devices for samples",
    status_code=status.HTTP_201_CREATED,
    responses=problems("model_not_found", "device_not_found", "bad_query", "no_device", "too_many_devices"),
)
def create_sample_request(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, wanted: SampleRequestCreate
) -> SampleRequestView:
    """Each device sends a file with what it keeps, within its link's budgets, and forgets what has come."""
    row = service.ask(session, settings, fleet_id, wanted, actor=actor)
    return service.request_view(session, row)


@router.get("/sample-requests", summary="List requests for samples")
def list_sample_requests(
    session: ReadSession,
    fleet_id: FleetId,
    paging: RequestPaging,
    model: Annotated[str | None, Query(description="Only of this model.")] = None,
    state: Annotated[RequestState | None, Query(description="Only those in this state.")] = None,
) -> Page[SampleRequestView]:
    """Requests, newest first."""
    rows = repository.requests_page(session, fleet_id, paging, model=model, state=state)
    return page(rows, paging, lambda row: service.request_view(session, row))


@router.get(
    "/sample-requests/{sample_request_id}",
    summary="Show a request for samples",
    responses=problems("sample_request_not_found"),
)
def show_sample_request(
    session: ReadSession, fleet_id: FleetId, sample_request_id: SampleRequestId
) -> SampleRequestView:
    """One request: what came of each device, how far it is, or why it has none."""
    return service.request_view(session, service.get_request(session, fleet_id, sample_request_id))


@router.post(
    "/sample-requests/{sample_request_id}/cancel",
    summary="Cancel a request for samples",
    responses=problems("sample_request_not_found", "sample_request_over"),
)
def cancel_sample_request(
    session: WriteSession,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    sample_request_id: SampleRequestId,
) -> SampleRequestView:
    """Devices send no more of it, and keep what they have; what has come stays."""
    row = service.get_request(session, fleet_id, sample_request_id)
    unchanged.check(session, row, lambda: service.request_view(session, row))
    service.cancel(session, settings, row, actor=actor)
    return service.request_view(session, row)


@router.get("/sample-sets", summary="List samples that have come")
def list_sample_sets(
    session: ReadSession,
    settings: AppSettings,
    fleet_id: FleetId,
    paging: SetPaging,
    model: Annotated[str | None, Query(description="Only of this model.")] = None,
    device: Annotated[str | None, Query(description="Only of this device.")] = None,
) -> Page[SampleSetView]:
    """Files of samples, newest first; each is deleted by itself after SHOAL_SAMPLES_DAYS."""
    rows = repository.sets_page(session, fleet_id, paging, model=model, device=device)
    return page(rows, paging, lambda row: service.set_view(*row, settings))


@router.get("/sample-sets/{set_id}", summary="Show samples", responses=problems("sample_set_not_found"))
def show_sample_set(
    session: ReadSession, settings: AppSettings, fleet_id: FleetId, set_id: SampleSetId
) -> SampleSetDetail:
    """One file of samples, and what is in it."""
    return service.set_detail(*service.get_set(session, fleet_id, set_id), settings)


@router.get(
    "/sample-sets/{set_id}/content",
    summary="Download samples",
    response_class=StreamingResponse,
    responses={
        **problems("sample_set_not_found", "range", "artifact_missing", "artifact_store"),
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
              "description": "The file, an `.npz`"},
        206: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
              "description": "The bytes of the `Range` that was asked for"},
    },
)  # fmt: skip
def download_sample_set(
    request: Request, session: WriteSession, store: Store, fleet_id: FleetId, actor: Actor, set_id: SampleSetId
) -> StreamingResponse:
    """The file; who reads it is in the audit log. `Range` gives a part of it."""
    upload, _ = service.get_set(session, fleet_id, set_id)
    service.note_download(session, upload, actor=actor)
    return artifact_answer(store, upload.digest or "", upload.size, request.headers)


@router.delete(
    "/sample-sets/{set_id}",
    summary="Delete samples",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("sample_set_not_found", "artifact_store"),
)
def delete_sample_set(
    session: WriteSession,
    settings: AppSettings,
    store: Store,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    set_id: SampleSetId,
) -> None:
    """The file goes at once; that there was one stays in the request and in the audit log."""
    upload, asked = service.get_set(session, fleet_id, set_id)
    unchanged.check(session, upload, lambda: service.set_detail(upload, asked, settings))
    service.remove_set(session, store, upload, actor=actor)
