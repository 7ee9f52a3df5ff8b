"""HTTP of enrolment: what devices ask for without being anybody yet, and what operators decide."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response, status
from sqlalchemy.orm import Session

from agent.protocol.brokers import without_credentials
from fleet_server.clock import utc_now
from fleet_server.enrolment import repository, service, tokens, views
from fleet_server.enrolment.schemas import (
    AuthorityView,
    EnrolmentCreate,
    EnrolmentState,
    EnrolmentSummary,
    EnrolmentView,
    IdentitySummary,
    IdentityView,
    RegistrationCreate,
    ServerCertificateCreate,
    ServerCertificateView,
    TokenCreate,
    TokenCreated,
    TokenView,
)
from fleet_server.enrolment.service import Authority
from fleet_server.errors import NotFoundError, TooLargeError, TooManyRequestsError
from fleet_server.http import Actor, AppSettings, DeviceId, FleetId, ReadSession, WriteSession
from fleet_server.models import Device, DeviceIdentity, Enrolment
from fleet_server.openapi import PUBLIC, problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.rates import KeyedBuckets
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page
from fleet_server.settings import Settings
from fleet_server.trust import service as trust

PEM = "application/x-pem-file"
# Requests of an address that came to nothing: so many at once, and so many more a second.
REFUSED_BURST = 60
REFUSED_RATE = 0.5

BODY_BYTES = 64 * 1024
router = APIRouter(tags=["enrolment"], route_class=ApiRoute)
EnrolmentPaging = Annotated[PageRequest, Depends(paged(repository.ENROLMENTS))]
TokenPaging = Annotated[PageRequest, Depends(paged(repository.TOKENS))]
IdentityPaging = Annotated[PageRequest, Depends(paged(repository.IDENTITIES))]
EnrolmentId = Annotated[str, Path(description="The request's id.")]
TokenId = Annotated[str, Path(alias="enrolment_token_id", description="The enrolment token's id.")]


class EnrolmentGate:
    """Bounds how fast an address may try."""

    def __init__(self) -> None:
        self._buckets = KeyedBuckets(REFUSED_RATE, REFUSED_BURST)

    def enter(self, address: str) -> None:
        """Raises `TooManyRequestsError` when too much of it came to nothing."""
        now = time.monotonic()
        bucket = self._buckets.of(address, now)
        if not bucket.take(1, now):
            detail = "too many requests to enrol came from this address: try again in a minute"
            raise TooManyRequestsError("too_many_enrolments", detail, retry_after_s=bucket.wait_s(1, now))

    def succeeded(self, address: str) -> None:
        """Gives back what was taken: a factory enrols many devices from one address."""
        self._buckets.of(address, time.monotonic()).give(1)


class _Guarded(ApiRoute):
    """Bounds the request of somebody who has proved nothing yet, before its body is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            if request.method == "POST":
                length = request.headers.get("content-length", "")
                if not (length.isascii() and length.isdigit() and len(length) < 9 and int(length) <= BODY_BYTES):
                    raise TooLargeError("body_too_large", f"say Content-Length, and send at most {BODY_BYTES} bytes")
                _gate(request).enter(_address(request))
            return await handle(request)

        return guarded


public = APIRouter(tags=["enrolment"], route_class=_Guarded)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _authority(request: Request) -> Authority:
    authority: Authority = request.app.state.authority
    return authority


def _gate(request: Request) -> EnrolmentGate:
    gate: EnrolmentGate = request.app.state.enrolment_gate
    return gate


AuthorityOf = Annotated[Authority, Depends(_authority)]
Gate = Annotated[EnrolmentGate, Depends(_gate)]


@public.get("/ca", summary="The fleet's CA", openapi_extra=PUBLIC)
def show_authority(authority: AuthorityOf) -> AuthorityView:
    """What certificates of this server and of the broker are checked against; public."""
    return AuthorityView(certificate=authority.ca.bundle, pin=authority.ca.pin)


@public.get(
    "/crl",
    summary="Revoked certificates",
    openapi_extra=PUBLIC,
    response_class=Response,
    responses={200: {"content": {PEM: {}}, "description": "A CRL (RFC 5280) as PEM"}},
)
def show_revocations(session: ReadSession, authority: AuthorityOf) -> Response:
    """For brokers that are not embedded: fetch it every minute and let the broker read it again."""
    now = utc_now()
    crl = authority.ca.revocation_list(repository.revoked_serials(session, now), now.replace(microsecond=0))
    return Response(crl, media_type=PEM)


@public.post(
    "/enrolments",
    summary="Ask for a device's certificate",
    openapi_extra=PUBLIC,
    responses=problems(
        "bad_enrolment_token",
        "key_locked_out",
        "wrong_key",
        "locked_out",
        "too_many_enrolments",
        "bad_csr",
        "bad_device_id",
        "reserved_device_id",
        "trust_keys",
    ),
)
def create_enrolment(
    request: Request,
    session: WriteSession,
    authority: AuthorityOf,
    gate: Gate,
    settings: AppSettings,
    wanted: EnrolmentCreate,
) -> EnrolmentView:
    """The enrolment token is the credential; without one the request waits until somebody approves it."""
    row = service.enrol(session, authority, wanted, _address(request))
    trust.ensure(session, settings, row.fleet_id)  # so that the device gets a root with its certificate
    if row.state == EnrolmentState.ISSUED:
        gate.succeeded(_address(request))
    return _view(session, row, authority, settings, request)


@public.get(
    "/enrolments/{enrolment_id}",
    summary="What became of a request to enrol",
    openapi_extra=PUBLIC,
    responses=problems("enrolment_not_found"),
)
def show_enrolment(
    request: Request, session: ReadSession, authority: AuthorityOf, settings: AppSettings, enrolment_id: EnrolmentId
) -> EnrolmentView:
    """A device asks here until it is approved. The id is known to who made the request; certificates are public."""
    row = session.get(Enrolment, enrolment_id)
    if row is None:
        raise NotFoundError("enrolment", enrolment_id, remedy="ask again: requests are forgotten after a day")
    return _view(session, row, authority, settings, request)


@router.get("/enrolments", summary="List requests to enrol")
def list_enrolments(
    session: ReadSession,
    fleet_id: FleetId,
    paging: EnrolmentPaging,
    state: Annotated[EnrolmentState | None, Query(description="Only those in this state.")] = None,
    device: Annotated[str | None, Query(description="Only this device's.")] = None,
) -> Page[EnrolmentSummary]:
    """Requests of the last day, newest first."""
    rows = repository.enrolments_page(session, fleet_id, paging, state=state, device=device)
    return page(rows, paging, EnrolmentSummary.model_validate)


@router.post(
    "/enrolments/{enrolment_id}/approve",
    summary="Approve a device",
    responses=problems("enrolment_not_found", "enrolment_decided", "key_locked_out", "bad_csr"),
)
def approve_enrolment(
    request: Request,
    session: WriteSession,
    fleet_id: FleetId,
    actor: Actor,
    authority: AuthorityOf,
    settings: AppSettings,
    unchanged: IfMatch,
    enrolment_id: EnrolmentId,
) -> EnrolmentSummary:
    """Compare the key's fingerprint with the one that the device shows first."""
    asked = service.get_enrolment(session, fleet_id, enrolment_id)
    unchanged.check(session, asked, lambda: _view(session, asked, authority, settings, request))
    row = service.decide(session, authority, fleet_id, enrolment_id, approve=True, actor=actor)
    return EnrolmentSummary.model_validate(row)


@router.post(
    "/enrolments/{enrolment_id}/reject",
    summary="Reject a device",
    responses=problems("enrolment_not_found", "enrolment_decided"),
)
def reject_enrolment(
    request: Request,
    session: WriteSession,
    fleet_id: FleetId,
    actor: Actor,
    authority: AuthorityOf,
    settings: AppSettings,
    unchanged: IfMatch,
    enrolment_id: EnrolmentId,
) -> EnrolmentSummary:
    """It may ask again."""
    asked = service.get_enrolment(session, fleet_id, enrolment_id)
    unchanged.check(session, asked, lambda: _view(session, asked, authority, settings, request))
    row = service.decide(session, authority, fleet_id, enrolment_id, approve=False, actor=actor)
    return EnrolmentSummary.model_validate(row)


@router.post(
    "/enrolment-tokens",
    summary="Create an enrolment token",
    status_code=status.HTTP_201_CREATED,
    responses=problems("bad_device_id", "reserved_device_id"),
)
def create_enrolment_token(
    session: WriteSession, fleet_id: FleetId, actor: Actor, authority: AuthorityOf, wanted: TokenCreate
) -> TokenCreated:
    """Its text is shown this once."""
    token, text = tokens.create(session, fleet_id, wanted, authority.ca.pin, actor=actor)
    return TokenCreated(**TokenView.model_validate(token).model_dump(), token=text)


@router.get("/enrolment-tokens", summary="List enrolment tokens")
def list_enrolment_tokens(session: ReadSession, fleet_id: FleetId, paging: TokenPaging) -> Page[TokenView]:
    """Those that can still be used, without their secrets."""
    rows = repository.tokens_page(session, fleet_id, paging, utc_now())
    return page(rows, paging, TokenView.model_validate)


@router.get(
    "/enrolment-tokens/{enrolment_token_id}",
    summary="Show an enrolment token",
    responses=problems("enrolment_token_not_found"),
)
def show_enrolment_token(session: ReadSession, fleet_id: FleetId, token_id: TokenId) -> TokenView:
    """One enrolment token, without its secret."""
    return TokenView.model_validate(tokens.get(session, fleet_id, token_id))


@router.delete(
    "/enrolment-tokens/{enrolment_token_id}",
    summary="End an enrolment token",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("enrolment_token_not_found"),
)
def delete_enrolment_token(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, token_id: TokenId
) -> None:
    """Devices that have enrolled with it keep their certificates."""
    row = tokens.get(session, fleet_id, token_id)
    unchanged.check(session, row, lambda: TokenView.model_validate(row))
    tokens.delete(session, fleet_id, token_id, actor=actor)


@router.post(
    "/device-identities",
    summary="Register a device",
    status_code=status.HTTP_201_CREATED,
    responses=problems("device_registered", "bad_device_id", "reserved_device_id", "device_not_found"),
)
def register_device(session: WriteSession, fleet_id: FleetId, actor: Actor, wanted: RegistrationCreate) -> IdentityView:
    """Before it first connects: by its id, and by its key where that is known."""
    service.register(session, fleet_id, wanted, actor=actor)
    return views.identity(session, fleet_id, wanted.device_id)


@router.get("/device-identities", summary="List devices that have an identity")
def list_identities(
    session: ReadSession,
    fleet_id: FleetId,
    paging: IdentityPaging,
    revoked: Annotated[bool | None, Query(description="Only those that are, or are not, locked out.")] = None,
) -> Page[IdentitySummary]:
    """Registered, enrolled and locked out ones, by id."""
    rows = repository.identities_page(session, fleet_id, paging, revoked=revoked)
    return page(rows, paging, views.identity_summary)


@router.get(
    "/devices/{device_id}/identity",
    summary="Show a device's identity",
    responses=problems("device_not_found"),
)
def show_identity(session: ReadSession, fleet_id: FleetId, device_id: DeviceId) -> IdentityView:
    """Its certificates, whether it is locked out, and how often it was out of order."""
    return views.identity(session, fleet_id, device_id)


@router.post(
    "/devices/{device_id}/revoke",
    summary="Lock a device out",
    responses=problems("device_not_found"),
)
def revoke_device(
    session: WriteSession, fleet_id: FleetId, actor: Actor, unchanged: IfMatch, device_id: DeviceId
) -> IdentityView:
    """For one that was lost: its certificates are revoked, and its connection is ended within seconds.

    `If-Match` takes the ETag of its identity.
    """
    views.identity(session, fleet_id, device_id)
    row = session.get(DeviceIdentity, device_id) or session.get_one(Device, device_id)
    unchanged.check(session, row, lambda: views.identity(session, fleet_id, device_id))
    service.revoke(session, fleet_id, device_id, actor=actor)
    return views.identity(session, fleet_id, device_id)


@router.post(
    "/server-certificates",
    summary="Issue a certificate to a broker, or to who listens to alerts",
    status_code=status.HTTP_201_CREATED,
    responses=problems("server_wide_needed", "bad_csr", "bad_name"),
)
def create_server_certificate(
    session: WriteSession, fleet_id: FleetId, actor: Actor, authority: AuthorityOf, wanted: ServerCertificateCreate
) -> ServerCertificateView:
    """For a broker of your own, or a program that listens to alerts; the key stays where the request was made."""
    issued = service.issue_beside(session, authority, fleet_id, wanted, actor=actor)
    now = utc_now()
    crl = authority.ca.revocation_list(repository.revoked_serials(session, now), now.replace(microsecond=0))
    return ServerCertificateView(certificate=issued.pem, ca=authority.ca.bundle, crl=crl, not_after=issued.not_after)


def _view(
    session: Session, row: Enrolment, authority: Authority, settings: Settings, request: Request
) -> EnrolmentView:
    return views.enrolment(session, row, authority.ca.bundle, _broker(settings, request.url.hostname or "localhost"))


def _broker(settings: Settings, reached_at: str) -> str:
    """What the device is to connect to; no credentials of the server's own go out."""
    if settings.broker_public_url is not None:
        return settings.broker_public_url
    if settings.broker_url is not None:
        return without_credentials(settings.broker_url)
    host = f"[{reached_at}]" if ":" in reached_at else reached_at
    return f"{'mqtts' if settings.broker_tls else 'mqtt'}://{host}:{settings.broker_port}"
