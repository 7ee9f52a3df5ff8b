"""HTTP of uploads, models, versions, variants and artifacts."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, status
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from agent.protocol.processing_rules import schema
from fleet_server.catalog import repository, service
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.downloads import artifact_answer
from fleet_server.catalog.schemas import ModelView, UploadView, VariantState, VariantView, VersionCreate, VersionView
from fleet_server.catalog.service import Inspector
from fleet_server.enrolment.service import is_locked_out
from fleet_server.errors import InvalidError, NotFoundError, TooLargeError, UnauthorizedError, UnavailableError
from fleet_server.http import (
    Actor,
    AppSettings,
    ArtifactDigest,
    Db,
    FleetId,
    ModelName,
    NewModelName,
    ReadSession,
    VariantId,
    VersionName,
)
from fleet_server.openapi import PUBLIC, problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Digest, Page
from fleet_server.settings import Settings

router = APIRouter(route_class=ApiRoute)
ModelPaging = Annotated[PageRequest, Depends(paged(repository.MODELS))]
VersionPaging = Annotated[PageRequest, Depends(paged(repository.VERSIONS))]
VariantPaging = Annotated[PageRequest, Depends(paged(repository.VARIANTS))]
ANY_SIZE = 1 << 62  # of uploads: they go to a file piece by piece, and _receive holds their own bound


def _store(request: Request) -> ArtifactStore:
    store: ArtifactStore = request.app.state.artifacts
    return store


def _inspector(request: Request) -> Inspector:
    inspector: Inspector = request.app.state.inspector
    return inspector


Store = Annotated[ArtifactStore, Depends(_store)]
VersionInspector = Annotated[Inspector, Depends(_inspector)]


@router.post(
    "/uploads",
    tags=["models"],
    summary="Upload a file",
    status_code=status.HTTP_201_CREATED,
    max_body_size=ANY_SIZE,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
    responses=problems(
        "upload_too_large", "upload_empty", "upload_damaged", "upload_incomplete", "disk_full", "artifact_store"
    ),
)
async def upload(
    request: Request,
    database: Db,
    store: Store,
    settings: AppSettings,
    fleet_id: FleetId,
    actor: Actor,
    sha256: Annotated[Digest | None, Query(description="Refuse the upload when its digest is another.")] = None,
) -> UploadView:
    """The raw bytes as the body. An upload that no version names is thrown away after a day."""
    folder = settings.state_dir / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        path = Path(work) / "upload"
        with _upload_problems():
            await _receive(request, path, settings, sha256)
        return await run_in_threadpool(service.add_upload, database, store, fleet_id, path, actor=actor)


async def _receive(request: Request, path: Path, settings: Settings, sha256: str | None) -> None:
    limit = settings.upload_max_mb * 1024 * 1024
    too_large = TooLargeError(
        "upload_too_large", f"an upload may have {settings.upload_max_mb} MiB (SHOAL_UPLOAD_MAX_MB)"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    seen, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        async for piece in request.stream():
            size += len(piece)
            if size > limit:
                raise too_large
            seen.update(piece)
            await run_in_threadpool(file.write, piece)
    if size == 0:
        raise InvalidError("upload_empty", "the body is empty: send the file's bytes", field="body")
    if sha256 is not None and seen.hexdigest() != sha256:
        raise InvalidError(
            "upload_damaged", "sha256: the bytes that came have another digest: send again", field="sha256"
        )


@contextlib.contextmanager
def _upload_problems() -> Iterator[None]:
    try:
        yield
    except ClientDisconnect:
        raise InvalidError("upload_incomplete", "the connection ended before the whole file had come") from None
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise UnavailableError("disk_full", "the server's disk is full: free some of its state folder") from None
        raise


@router.get("/models", tags=["models"], summary="List models")
def list_models(session: ReadSession, fleet_id: FleetId, paging: ModelPaging) -> Page[ModelView]:
    """Every model, by name."""
    rows = repository.models_page(session, fleet_id, paging)
    return page(rows, paging, lambda row: service.model_view(session, row))


@router.get(
    "/models/{model}",
    tags=["models"],
    summary="Show a model",
    responses=problems("model_not_found"),
)
def show_model(session: ReadSession, fleet_id: FleetId, model: ModelName) -> ModelView:
    """One model with the name of its newest version."""
    return service.model_view(session, service.get_model(session, fleet_id, model))


@router.post(
    "/models/{model}/versions",
    tags=["models"],
    summary="Create a version",
    status_code=status.HTTP_201_CREATED,
    responses=problems(
        *(
            "version_exists",
            "reserved_name",
            "upload_not_found",
            "duplicate_format",
            "bad_model",
            "bad_data",
            "bad_processing",
            "bad_architecture",
            "bad_net",
        ),
        *("bad_weights", "forms_disagree", "no_examples", "not_exportable", "unknown_architecture", "timeout"),
        *("worker_died", "worker_failed", "artifact_store", "artifact_missing", "artifact_damaged", "disk_full"),
    ),
)
def create_version(
    database: Db,
    store: Store,
    inspector: VersionInspector,
    fleet_id: FleetId,
    actor: Actor,
    model: NewModelName,
    wanted: VersionCreate,
) -> VersionView:
    """Files are uploaded before and named here by digest. They are loaded, compared and tried on the data sets first.

    A version that is refused leaves nothing behind.
    """
    return service.create_version(
        database, store, inspector, fleet_id=fleet_id, model_name=model, wanted=wanted, actor=actor
    )


@router.get("/schemas/processing", tags=["models"], summary="Schema of a processing file")
def processing_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of what a version declares of images and answers: for editors, and for checks before."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema()}


@router.get(
    "/models/{model}/versions",
    tags=["models"],
    summary="List versions",
    responses=problems("model_not_found"),
)
def list_versions(
    session: ReadSession, fleet_id: FleetId, paging: VersionPaging, model: ModelName
) -> Page[VersionView]:
    """A model's versions, newest first."""
    found = service.get_model(session, fleet_id, model)
    rows = repository.versions_page(session, found.id, paging)
    return page(rows, paging, lambda row: service.version_view(session, found, row))


@router.get(
    "/models/{model}/versions/{version}",
    tags=["models"],
    summary="Show a version",
    responses=problems("model_not_found", "version_not_found"),
)
def show_version(session: ReadSession, fleet_id: FleetId, model: ModelName, version: VersionName) -> VersionView:
    """One version: its files, tensors, data sets and what the check at upload found."""
    return service.version_view(session, *service.get_version(session, fleet_id, model, version))


@router.delete(
    "/models/{model}/versions/{version}",
    tags=["models"],
    summary="Delete a version",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("model_not_found", "version_not_found", "version_in_use", "gate_running", "artifact_store"),
)
def delete_version(
    database: Db,
    store: Store,
    fleet_id: FleetId,
    actor: Actor,
    unchanged: IfMatch,
    model: ModelName,
    version: VersionName,
) -> None:
    """Only one that was never rolled out: its variants and files go with it, and the model with its last version.

    A variant that is being built is given up.
    """
    service.delete_version(
        database, store, fleet_id=fleet_id, model_name=model, name=version, actor=actor, unchanged=unchanged
    )


@router.get(
    "/variants",
    tags=["variants"],
    summary="List variants",
    responses=problems("model_not_found", "version_not_found", "bad_version"),
)
def list_variants(
    session: ReadSession,
    fleet_id: FleetId,
    paging: VariantPaging,
    version: Annotated[str | None, Query(description="Only of this `model@version`.")] = None,
    profile: Annotated[str | None, Query(description="Only for this profile.")] = None,
    state: Annotated[VariantState | None, Query(description="Only those in this state.")] = None,
) -> Page[VariantView]:
    """Variants, newest first, with what was measured and what the gate said."""
    version_id = service.resolve_version(session, fleet_id, version).id if version else None
    rows = repository.variants_page(session, fleet_id, paging, version_id=version_id, profile=profile, state=state)
    return page(rows, paging, lambda row: service.variant_view(session, row))


@router.get(
    "/variants/{variant_id}",
    tags=["variants"],
    summary="Show a variant",
    responses=problems("variant_not_found"),
)
def show_variant(session: ReadSession, fleet_id: FleetId, variant_id: VariantId) -> VariantView:
    """One variant: every candidate that was tried, its measurements, its lineage, the gate's checks."""
    return service.get_variant(session, fleet_id, variant_id)


_BYTES: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_DOWNLOAD: dict[int | str, dict[str, Any]] = {
    **problems("artifact_not_found", "range", "artifact_store", "artifact_missing", "bad_ticket", "locked_out"),
    200: {"content": _BYTES, "description": "The bytes"},
    206: {"content": _BYTES, "description": "The bytes of the `Range` that was asked for"},
}


@router.get(
    "/artifacts/{digest}",
    tags=["variants"],
    summary="Download an artifact",
    response_class=StreamingResponse,
    responses=_DOWNLOAD,
)
def download_artifact(
    request: Request, session: ReadSession, store: Store, fleet_id: FleetId, digest: ArtifactDigest
) -> StreamingResponse:
    """The bytes of an artifact or a source form; with `Range` a part of them, with `If-Range` of what `ETag` names."""
    blob = repository.blob(session, fleet_id, digest)
    if blob is None:
        raise NotFoundError("artifact", digest, remedy="`digest` of a variant or a version's source names one")
    return artifact_answer(store, digest, blob.size, request.headers)


@router.get(
    "/device-artifacts/{digest}",
    tags=["devices"],
    summary="Download as a device",
    response_class=StreamingResponse,
    responses=_DOWNLOAD,
    openapi_extra=PUBLIC,
)
def fetch_artifact(request: Request, session: ReadSession, store: Store, digest: ArtifactDigest) -> StreamingResponse:
    """What a device is to run or to measure, with `Range`; its bearer token is a ticket that it asked for over MQTT."""
    limits = request.app.state.request_limits
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    try:
        ticket = request.app.state.tickets.read(text if scheme.lower() == "bearer" else "", digest, time.time())
    except UnauthorizedError:
        limits.count_address(request.client.host if request.client else "")
        raise
    limits.count_principal(f"device/{ticket.device_id}")
    if is_locked_out(session, ticket.device_id):
        raise UnauthorizedError("locked_out", f"device {ticket.device_id!r} was locked out: enrol it again")
    return artifact_answer(store, digest, ticket.size, request.headers)
