"""HTTP of the TUF repository."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response, status

from fleet_server.errors import NotFoundError
from fleet_server.http import Actor, AppSettings, FleetId, ReadSession, WriteSession
from fleet_server.openapi import problems
from fleet_server.routes import ApiRoute
from fleet_server.trust import roots, service, views
from fleet_server.trust.schemas import KeyCreate, KeyView, SignatureUpload, SignatureView, TrustView

router = APIRouter(tags=["trust"], route_class=ApiRoute)
MetadataFile = Annotated[str, Path(description="Its name, as TUF clients ask for it.", examples=["timestamp.json"])]


@router.get(
    "/trust",
    summary="Show the fleet's TUF repository",
    responses=problems("trust_keys"),
)
def show_trust(session: WriteSession, settings: AppSettings, fleet_id: FleetId) -> TrustView:
    """Roles with their keys, thresholds and expiry, and what waits for signatures."""
    return views.trust_view(session, settings, fleet_id)


@router.get(
    "/trust/metadata/{file}",
    summary="Read a metadata file",
    response_class=Response,
    responses=problems("metadata_file_not_found")
    | {200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
)
def trust_metadata(session: ReadSession, fleet_id: FleetId, file: MetadataFile) -> Response:
    """`root.json` (the newest), `3.root.json`, `timestamp.json`, `7.model.mnist.json`: the bytes that were signed."""
    body = service.metadata_file(session, fleet_id, file)
    if body is None:
        raise NotFoundError("metadata_file", file, remedy="see what there is with `shoal trust status`")
    return Response(body, media_type="application/json")


@router.post(
    "/trust/signatures",
    summary="Hand in signed metadata",
    responses=problems(
        "bad_metadata", "bad_signature", "bad_proposal", "online_key", "root_version", "proposal_changed", "trust_keys"
    ),
)
def add_signatures(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, signed: SignatureUpload
) -> SignatureView:
    """A proposal with more signatures, or the next root; it is published when its threshold is met.

    A root also needs the keys of the one before it. Those that lie on this server sign by themselves.
    """
    body = signed.body.encode()
    if signed.role == "root":
        published = roots.accept_root(session, settings, fleet_id, body, actor=actor)
    else:
        published = service.accept(session, settings, fleet_id, signed.role, body, actor=actor)
    return SignatureView(role=signed.role, published=published)


@router.post(
    "/trust/keys",
    summary="Let the server make a signing key",
    status_code=status.HTTP_201_CREATED,
    responses=problems("offline_role", "trust_keys"),
)
def make_key(
    session: WriteSession, settings: AppSettings, fleet_id: FleetId, actor: Actor, wanted: KeyCreate
) -> KeyView:
    """For a role that it signs by itself. The key counts once a root names it: `shoal trust rotate` does both."""
    key = roots.make_key(session, settings, fleet_id, wanted.role, actor=actor)
    return KeyView(id=key.keyid, key=key.to_dict())
