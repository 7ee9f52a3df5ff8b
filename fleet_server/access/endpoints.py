"""HTTP of login, users, service tokens, fleets and the audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, status

from fleet_server.access import repository, service
from fleet_server.access.authentication import LoginDesk
from fleet_server.access.schemas import (
    AuditEventView,
    AuditVerification,
    FleetCreate,
    FleetUpdate,
    FleetView,
    Login,
    LoginView,
    Me,
    NewToken,
    OidcClient,
    Session,
    TokenCreate,
    TokenView,
    UserCreate,
    UserUpdate,
    UserView,
)
from fleet_server.clock import utc_now
from fleet_server.http import (
    Actor,
    AppSettings,
    CurrentPrincipal,
    Db,
    FleetId,
    Origin,
    ReadSession,
    WriteSession,
)
from fleet_server.openapi import PUBLIC, problems
from fleet_server.paging import PageRequest, page, paged
from fleet_server.preconditions import IfMatch
from fleet_server.principals import Role
from fleet_server.routes import ApiRoute
from fleet_server.schemas import Page

router = APIRouter(route_class=ApiRoute)
FleetPaging = Annotated[PageRequest, Depends(paged(repository.FLEETS))]
UserPaging = Annotated[PageRequest, Depends(paged(repository.USERS))]
TokenPaging = Annotated[PageRequest, Depends(paged(repository.TOKENS))]
EventPaging = Annotated[PageRequest, Depends(paged(repository.EVENTS))]
UserName = Annotated[str, Path(description="The user's name.", examples=["ada"])]
TokenId = Annotated[str, Path(description="The token's id: the middle part of its text.")]
FleetName = Annotated[str, Path(description="The fleet's id.", examples=["plant7"])]


@router.post(
    "/login",
    tags=["access"],
    summary="Log in",
    openapi_extra=PUBLIC,
    responses=problems("wrong_login", "too_many_guesses"),
)
def login(request: Request, database: Db, origin: Origin, wanted: Login) -> Session:
    """A session of a user, for some hours. Wrong names and passwords are answered ever more slowly."""
    desk: LoginDesk = request.app.state.login_desk
    return desk.log_in(database, wanted, origin, utc_now())


@router.get("/login", tags=["access"], summary="Show how people log in", openapi_extra=PUBLIC)
def show_login(settings: AppSettings) -> LoginView:
    """The OpenID provider, where there is one; names and passwords always do (`POST`)."""
    if settings.oidc_issuer is None or settings.oidc_client_id is None:
        return LoginView(oidc=None)
    return LoginView(oidc=OidcClient(issuer=settings.oidc_issuer, client_id=settings.oidc_client_id))


@router.post(
    "/logout",
    tags=["access"],
    summary="Log out",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("oidc_token", "admin_token"),
)
def logout(session: WriteSession, principal: CurrentPrincipal, actor: Actor) -> None:
    """Ends the session, or the service token, that the request came with."""
    service.log_out(session, principal, utc_now(), actor=actor)


@router.get("/me", tags=["access"], summary="Show who the caller is")
def show_me(principal: CurrentPrincipal) -> Me:
    """The caller's name, fleet and role there."""
    return Me(name=principal.name, fleet=principal.fleet_id, role=principal.role, server_wide=principal.server_wide)


@router.get("/fleets", tags=["access"], summary="List fleets")
def list_fleets(session: ReadSession, principal: CurrentPrincipal, paging: FleetPaging) -> Page[FleetView]:
    """Every fleet for a server-wide admin; for others the one they act in."""
    rows = repository.fleets_page(session, paging, only=None if principal.server_wide else principal.fleet_id)
    return page(rows, paging, FleetView.model_validate)


@router.post(
    "/fleets",
    tags=["access"],
    summary="Create a fleet",
    status_code=status.HTTP_201_CREATED,
    responses=problems("server_wide_needed"),
)
def create_fleet(session: WriteSession, principal: CurrentPrincipal, actor: Actor, wanted: FleetCreate) -> FleetView:
    """Only by a server-wide admin; one that is there already is answered as it is."""
    return FleetView.model_validate(service.create_fleet(session, principal, wanted, actor=actor))


@router.get(
    "/fleets/{fleet}",
    tags=["access"],
    summary="Show a fleet",
    responses=problems("fleet_not_found"),
)
def show_fleet(session: ReadSession, principal: CurrentPrincipal, fleet: FleetName) -> FleetView:
    """One fleet with its settings."""
    return FleetView.model_validate(service.get_fleet(session, principal, fleet))


@router.patch(
    "/fleets/{fleet}",
    tags=["access"],
    summary="Change a fleet",
    responses=problems("fleet_not_found"),
)
def change_fleet(
    session: WriteSession,
    principal: CurrentPrincipal,
    actor: Actor,
    unchanged: IfMatch,
    fleet: FleetName,
    change: FleetUpdate,
) -> FleetView:
    """How many approvals a new rollout needs. Those that wait keep the number that they were created with."""
    row = service.get_fleet(session, principal, fleet)
    unchanged.check(session, row, lambda: show_fleet(session, principal, fleet))
    return FleetView.model_validate(service.change_fleet(session, principal, fleet, change, actor=actor))


@router.get("/users", tags=["access"], summary="List users")
def list_users(
    session: ReadSession,
    principal: CurrentPrincipal,
    paging: UserPaging,
    role: Annotated[Role | None, Query(description="Only those with this role in the caller's fleet.")] = None,
) -> Page[UserView]:
    """Users with a role in the caller's fleet, by name; a server-wide admin sees such admins too."""
    wide = principal.server_wide
    rows = repository.users_page(session, principal.fleet_id, paging, server_wide=wide, role=role)
    return page(rows, paging, lambda row: service.user_view(session, principal, row))


@router.post(
    "/users",
    tags=["access"],
    summary="Create a user",
    status_code=status.HTTP_201_CREATED,
    responses=problems("user_exists", "server_wide_needed"),
)
def create_user(session: WriteSession, principal: CurrentPrincipal, actor: Actor, wanted: UserCreate) -> UserView:
    """A person who logs in, with a role in the caller's fleet."""
    return service.create_user(session, principal, wanted, actor=actor)


@router.get(
    "/users/{user}",
    tags=["access"],
    summary="Show a user",
    responses=problems("user_not_found"),
)
def show_user(session: ReadSession, principal: CurrentPrincipal, user: UserName) -> UserView:
    """One user, with the role in the caller's fleet."""
    return service.user_view(session, principal, service.get_user(session, principal, user))


@router.patch(
    "/users/{user}",
    tags=["access"],
    summary="Change a user",
    responses=problems("user_not_found", "user_of_other_fleets"),
)
def change_user(
    session: WriteSession,
    principal: CurrentPrincipal,
    actor: Actor,
    unchanged: IfMatch,
    user: UserName,
    change: UserUpdate,
) -> UserView:
    """Role in the caller's fleet, or password. A server-wide admin gives users of other fleets a role here so too."""
    row = service.get_user(session, principal, user, of_any_fleet=principal.server_wide)
    unchanged.check(session, row, lambda: service.user_view(session, principal, row))
    return service.change_user(session, principal, user, change, actor=actor)


@router.delete(
    "/users/{user}",
    tags=["access"],
    summary="Delete a user",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("user_not_found", "server_wide_needed"),
)
def delete_user(
    session: WriteSession, principal: CurrentPrincipal, actor: Actor, unchanged: IfMatch, user: UserName
) -> None:
    """Takes the role in the caller's fleet away, and with the last role the user and their sessions."""
    row = service.get_user(session, principal, user)
    unchanged.check(session, row, lambda: service.user_view(session, principal, row))
    service.delete_user(session, principal, user, actor=actor)


@router.get("/tokens", tags=["access"], summary="List service tokens")
def list_tokens(session: ReadSession, principal: CurrentPrincipal, paging: TokenPaging) -> Page[TokenView]:
    """Tokens of the caller's fleet, ended ones too; a server-wide admin sees server-wide ones as well."""
    rows = repository.tokens_page(session, principal.fleet_id, paging, server_wide=principal.server_wide)
    return page(rows, paging, service.token_view)


@router.post(
    "/tokens",
    tags=["access"],
    summary="Create a service token",
    status_code=status.HTTP_201_CREATED,
    responses=problems("token_exists", "server_wide_needed"),
)
def create_token(session: WriteSession, principal: CurrentPrincipal, actor: Actor, wanted: TokenCreate) -> NewToken:
    """For programs. The answer holds its text, once: the server keeps a hash."""
    return service.create_token(session, principal, wanted, utc_now(), actor=actor)


@router.get(
    "/tokens/{token_id}",
    tags=["access"],
    summary="Show a service token",
    responses=problems("token_not_found"),
)
def show_token(session: ReadSession, principal: CurrentPrincipal, token_id: TokenId) -> TokenView:
    """One service token, without its secret."""
    return service.token_view(service.get_token(session, principal, token_id))


@router.delete(
    "/tokens/{token_id}",
    tags=["access"],
    summary="Revoke a service token",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=problems("token_not_found"),
)
def revoke_token(
    session: WriteSession, principal: CurrentPrincipal, actor: Actor, unchanged: IfMatch, token_id: TokenId
) -> None:
    """It holds no longer, from the next request on."""
    row = service.get_token(session, principal, token_id)
    unchanged.check(session, row, lambda: service.token_view(row))
    service.revoke_token(session, principal, token_id, utc_now(), actor=actor)


@router.get("/audit-events", tags=["audit"], summary="List what was done")
def list_events(
    session: ReadSession,
    fleet_id: FleetId,
    paging: EventPaging,
    actor: Annotated[str | None, Query(description="Only what they did, such as `user/ada`; `*` as any text.")] = None,
    action: Annotated[str | None, Query(description="Only this, such as `rollout.create` or `rollout.*`.")] = None,
    subject: Annotated[str | None, Query(description="Only what was done to this, such as `device/camera-*`.")] = None,
) -> Page[AuditEventView]:
    """Who did what to which thing, newest first."""
    rows = repository.events_page(session, fleet_id, paging, actor=actor, action=action, subject=subject)
    return page(rows, paging, AuditEventView.model_validate)


@router.get("/audit-events/verify", tags=["audit"], summary="Verify the audit log")
def verify_events(session: ReadSession, fleet_id: FleetId) -> AuditVerification:
    """Walks the whole hash chain of the fleet, and names the first event that was changed, removed or put in."""
    return service.verify_audit(session, fleet_id)
