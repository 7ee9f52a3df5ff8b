"""Rules of fleets, users and service tokens. Each function works in its caller's transaction."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

from sqlalchemy.orm import Session

from fleet_server import audit
from fleet_server.access import repository, secret_tokens
from fleet_server.access.oidc import OIDC_PREFIX
from fleet_server.access.passwords import hash_password
from fleet_server.access.policy import server_wide_needed
from fleet_server.access.schemas import (
    AuditVerification,
    BreakView,
    FleetCreate,
    FleetUpdate,
    NewToken,
    TokenCreate,
    TokenView,
    UserCreate,
    UserUpdate,
    UserView,
)
from fleet_server.errors import ConflictError, ForbiddenError, NotFoundError
from fleet_server.models import AccessToken, Fleet, Grant, User
from fleet_server.principals import Actor, Principal, Role


def create_fleet(session: Session, principal: Principal, wanted: FleetCreate, *, actor: Actor) -> Fleet:
    """Add a fleet; the same again is answered as it is."""
    found = repository.fleet(session, wanted.id)
    if found is not None:
        return found
    fleet = Fleet(id=wanted.id)
    session.add(fleet)
    session.flush()
    for fleet_id in (principal.fleet_id, fleet.id):
        audit.record(session, fleet_id=fleet_id, actor=actor, action="fleet.create", subject=f"fleet/{fleet.id}")
    return fleet


def get_fleet(session: Session, principal: Principal, fleet_id: str) -> Fleet:
    """A fleet that the principal may see.

    Raises:
        NotFoundError: for another, whether it is there or not.
    """
    fleet = repository.fleet(session, fleet_id) if principal.server_wide or fleet_id == principal.fleet_id else None
    if fleet is None:
        raise NotFoundError("fleet", fleet_id, remedy="list them with `shoal fleet list`")
    return fleet


def change_fleet(session: Session, principal: Principal, fleet_id: str, change: FleetUpdate, *, actor: Actor) -> Fleet:
    """Change a fleet's settings. Rollouts that wait keep the number of approvals they were created with.

    Raises:
        NotFoundError: as `get_fleet`.
    """
    fleet = get_fleet(session, principal, fleet_id)
    before = {"approvals": fleet.approvals}
    if change.approvals is not None:
        fleet.approvals = change.approvals
    audit.record(
        session,
        fleet_id=fleet.id,
        actor=actor,
        action="fleet.update",
        subject=f"fleet/{fleet.id}",
        before=before,
        after={"approvals": fleet.approvals},
    )
    return fleet


def create_user(session: Session, principal: Principal, wanted: UserCreate, *, actor: Actor) -> UserView:
    """Add a user with a role in the principal's fleet; a server-wide admin may give one that is there a role.

    Raises:
        ForbiddenError: for a server-wide user, to others than server-wide admins.
        ConflictError: when the name is taken.
    """
    if wanted.server_wide and not principal.server_wide:
        raise server_wide_needed(principal)
    if repository.user(session, wanted.name) is not None:
        raise ConflictError("user_exists", f"there is a user {wanted.name!r} already: take another name")
    user = User(name=wanted.name, password_hash=hash_password(wanted.password), server_wide=wanted.server_wide)
    session.add(user)
    session.flush()
    session.add(Grant(user_id=user.id, fleet_id=principal.fleet_id, role=wanted.role.value))
    session.flush()
    after = {"role": wanted.role, "server_wide": wanted.server_wide}
    _record_user(session, principal, user, actor, "user.create", after=after)
    return user_view(session, principal, user)


def change_user(session: Session, principal: Principal, name: str, change: UserUpdate, *, actor: Actor) -> UserView:
    """Change a user's role in the principal's fleet, or password.

    A server-wide admin may so give a user of another fleet a role in this one.

    Raises:
        NotFoundError: when the fleet has none of that name.
        ForbiddenError: for the password of a user who has rights that the principal has not.
    """
    user = get_user(session, principal, name, of_any_fleet=principal.server_wide)
    detail: dict[str, object] = {}
    before = {"role": repository.grants(session, user.id).get(principal.fleet_id)}
    if change.password is not None:
        _check_may_own(session, principal, user)
        user.password_hash = hash_password(change.password)
        repository.end_sessions(session, user.id)
        detail["password"] = "changed"  # noqa: S105 (that it was, not which)
    if change.role is not None:
        grant = session.get(Grant, (user.id, principal.fleet_id))
        if grant is None:
            grant = Grant(user_id=user.id, fleet_id=principal.fleet_id)
            session.add(grant)
        grant.role = change.role.value
    session.flush()
    after = {"role": repository.grants(session, user.id).get(principal.fleet_id)}
    _record_user(session, principal, user, actor, "user.update", detail=detail, before=before, after=after)
    return user_view(session, principal, user)


def delete_user(session: Session, principal: Principal, name: str, *, actor: Actor) -> None:
    """Take a user's role in the principal's fleet away, and with the last one the user.

    Raises:
        NotFoundError: when the fleet has none of that name.
        ForbiddenError: for a server-wide user, to others than server-wide admins.
    """
    user = get_user(session, principal, name)
    if user.server_wide and not principal.server_wide:
        raise server_wide_needed(principal)
    before = {"role": repository.grants(session, user.id).get(principal.fleet_id)}
    if user.server_wide or set(repository.grants(session, user.id)) <= {principal.fleet_id}:
        repository.delete_user(session, user)
    else:
        session.delete(session.get_one(Grant, (user.id, principal.fleet_id)))
        session.flush()
    _record_user(session, principal, user, actor, "user.delete", before=before)


def user_view(session: Session, principal: Principal, user: User) -> UserView:
    """The HTTP shape of a user."""
    role = repository.grants(session, user.id).get(principal.fleet_id)
    return UserView(
        name=user.name, role=Role(role) if role else None, server_wide=user.server_wide, created_at=user.created_at
    )


def get_user(session: Session, principal: Principal, name: str, *, of_any_fleet: bool = False) -> User:
    """A user whom the principal's fleet sees.

    Raises:
        NotFoundError: when it sees none of that name.
    """
    user = repository.user(session, name)
    visible = user is not None and (
        of_any_fleet
        or principal.fleet_id in repository.grants(session, user.id)
        or (user.server_wide and principal.server_wide)
    )
    if user is None or not visible:
        raise NotFoundError("user", name, remedy="list them with `shoal user list`")
    return user


def _check_may_own(session: Session, principal: Principal, user: User) -> None:
    """Whoever sets a password can act as that user: nobody may so get rights elsewhere."""
    if principal.server_wide:
        return
    if user.server_wide or set(repository.grants(session, user.id)) != {principal.fleet_id}:
        raise ForbiddenError(
            "user_of_other_fleets", f"{user.name} has rights beyond this fleet: ask a server-wide admin to do this"
        )


def _record_user(
    session: Session, principal: Principal, user: User, actor: Actor, action: str, **what: Mapping[str, object]
) -> None:
    subject = f"user/{user.name}"
    audit.record(session, fleet_id=principal.fleet_id, actor=actor, action=action, subject=subject, **what)


def create_token(
    session: Session, principal: Principal, wanted: TokenCreate, now: dt.datetime, *, actor: Actor
) -> NewToken:
    """Add a service token; its secret is in the answer and nowhere else.

    Raises:
        ForbiddenError: for a server-wide one, to others than server-wide admins.
        ConflictError: when another one that holds has the name.
    """
    if wanted.server_wide and not principal.server_wide:
        raise server_wide_needed(principal)
    fleet_id = None if wanted.server_wide else principal.fleet_id
    if repository.named_token(session, fleet_id, wanted.name) is not None:
        raise ConflictError(
            "token_exists", f"there is a token {wanted.name!r} already: revoke it first, or take another name"
        )
    minted = secret_tokens.mint()
    token = AccessToken(
        id=minted.id,
        digest=minted.digest,
        name=wanted.name,
        fleet_id=fleet_id,
        role=wanted.role.value,
        created_by=actor.name,
        expires_at=now + dt.timedelta(days=wanted.days),
    )
    session.add(token)
    session.flush()
    detail = wanted.model_dump(mode="json", exclude={"name"}) | {"name": wanted.name}
    _record_token(session, principal, token, actor, "token.create", detail)
    return NewToken(**token_view(token).model_dump(), token=minted.text)


def get_token(session: Session, principal: Principal, token_id: str) -> AccessToken:
    """A service token that the principal may see.

    Raises:
        NotFoundError: when there is none of that id.
    """
    token = repository.service_token(session, principal.fleet_id, token_id, server_wide=principal.server_wide)
    if token is None:
        raise NotFoundError("token", token_id, remedy="list them with `shoal token list`")
    return token


def revoke_token(session: Session, principal: Principal, token_id: str, now: dt.datetime, *, actor: Actor) -> None:
    """End a service token; one that has ended already is fine.

    Raises:
        NotFoundError: when the fleet has none of that id.
    """
    token = get_token(session, principal, token_id)
    if token.revoked_at is None:
        token.revoked_at = now
        _record_token(session, principal, token, actor, "token.revoke", {"name": token.name})


def log_out(session: Session, principal: Principal, now: dt.datetime, *, actor: Actor) -> None:
    """End the token that the principal came with; one that this server did not make can't be ended so.

    Raises:
        ConflictError: for the admin token of the settings, and tokens of the OpenID provider.
    """
    if principal.id.startswith(OIDC_PREFIX):
        raise ConflictError(
            "oidc_token", "a token of the OpenID provider holds until it expires: forget it, or log out there"
        )
    if principal.token_id is None:
        raise ConflictError("admin_token", "the server's admin token can't log out: change SHOAL_ADMIN_TOKEN instead")
    token = session.get_one(AccessToken, principal.token_id)
    token.revoked_at = now
    subject = principal.name if token.user_id else f"token/{token.id}"
    audit.record(session, fleet_id=principal.fleet_id, actor=actor, action="session.close", subject=subject)


def verify_audit(session: Session, fleet_id: str) -> AuditVerification:
    """Walk the fleet's audit chain."""
    head = repository.audit_head(session, fleet_id)
    # What is added while this walks comes after the head that was read.
    found = audit.verify(repository.events_until(session, fleet_id, head.sequence if head else None), head)
    broken = BreakView(sequence=found.broken.sequence, reason=found.broken.reason) if found.broken else None
    return AuditVerification(whole=broken is None, events=found.events, hash=found.hash, broken=broken)


def token_view(token: AccessToken) -> TokenView:
    """The HTTP shape of a service token."""
    return TokenView(
        id=token.id,
        name=token.name,
        role=Role(token.role),
        server_wide=token.fleet_id is None,
        created_by=token.created_by,
        created_at=token.created_at,
        expires_at=token.expires_at,
        revoked_at=token.revoked_at,
        last_used_at=token.last_used_at,
    )


def _record_token(
    session: Session, principal: Principal, token: AccessToken, actor: Actor, action: str, detail: dict[str, object]
) -> None:
    audit.record(
        session, fleet_id=principal.fleet_id, actor=actor, action=action, subject=f"token/{token.id}", detail=detail
    )
