"""Every query over fleets, users, tokens and the audit log."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from fleet_server.models import AccessToken, AuditEvent, AuditHead, Fleet, Grant, User
from fleet_server.paging import PageRequest, Rows, TableList, matches

FLEETS = TableList(Fleet.id, {"id": Fleet.id, "created_at": Fleet.created_at}, default="id", time=Fleet.created_at)
USERS = TableList(
    User.id,
    {"name": User.name, "created_at": User.created_at},
    default="name",
    name=User.name,
    time=User.created_at,
)
TOKENS = TableList(
    AccessToken.id,
    {"created_at": AccessToken.created_at, "name": AccessToken.name, "expires_at": AccessToken.expires_at},
    default="created_at",
    name=AccessToken.name,
    time=AccessToken.created_at,
)
EVENTS = TableList(
    AuditEvent.sequence, {"sequence": AuditEvent.sequence}, default="-sequence", time=AuditEvent.at, times=""
)


def fleet(session: Session, fleet_id: str) -> Fleet | None:
    """One fleet."""
    return session.get(Fleet, fleet_id)


def fleets_page(session: Session, request: PageRequest, *, only: str | None) -> Rows[Fleet]:
    """A page of fleets; `only` that one where it is given."""
    query = select(Fleet)
    return FLEETS.scalars(session, query if only is None else query.where(Fleet.id == only), request)


def token(session: Session, token_id: str) -> AccessToken | None:
    """A token by its public id."""
    return session.get(AccessToken, token_id)


def service_token(session: Session, fleet_id: str, token_id: str, *, server_wide: bool) -> AccessToken | None:
    """A service token of a fleet, or, for who may see those too, a server-wide one."""
    query = select(AccessToken).where(AccessToken.id == token_id, AccessToken.user_id.is_(None))
    return session.scalar(query.where(_of_fleet(fleet_id, server_wide=server_wide)))


def tokens_page(session: Session, fleet_id: str, request: PageRequest, *, server_wide: bool) -> Rows[AccessToken]:
    """A page of service tokens."""
    query = select(AccessToken).where(AccessToken.user_id.is_(None), _of_fleet(fleet_id, server_wide=server_wide))
    return TOKENS.scalars(session, query, request)


def named_token(session: Session, fleet_id: str | None, name: str) -> AccessToken | None:
    """The service token of a name that was not revoked."""
    of_fleet = AccessToken.fleet_id.is_(None) if fleet_id is None else AccessToken.fleet_id == fleet_id
    query = select(AccessToken).where(of_fleet, AccessToken.name == name, AccessToken.user_id.is_(None))
    return session.scalar(query.where(AccessToken.revoked_at.is_(None)).limit(1))


def _of_fleet(fleet_id: str, *, server_wide: bool):  # type: ignore[no-untyped-def]  # noqa: ANN202 (a condition)
    mine = AccessToken.fleet_id == fleet_id
    return or_(mine, AccessToken.fleet_id.is_(None)) if server_wide else mine


def touch_token(session: Session, token_id: str, now: dt.datetime) -> None:
    """Note that a token was used."""
    session.execute(update(AccessToken).where(AccessToken.id == token_id).values(last_used_at=now))


def sweep_sessions(session: Session, now: dt.datetime) -> None:
    """Forget sessions that are over."""
    session.execute(delete(AccessToken).where(AccessToken.user_id.is_not(None), AccessToken.expires_at < now))


def end_sessions(session: Session, user_id: str) -> None:
    """Forget every session of a user."""
    session.execute(delete(AccessToken).where(AccessToken.user_id == user_id))


def user(session: Session, name: str) -> User | None:
    """A user by name, of any fleet."""
    return session.scalar(select(User).where(User.name == name))


def users_page(
    session: Session, fleet_id: str, request: PageRequest, *, server_wide: bool, role: str | None
) -> Rows[User]:
    """A page of the users with a role in a fleet, and of server-wide ones for who may see them."""
    granted = select(Grant.user_id).where(Grant.fleet_id == fleet_id)
    if role is not None:
        return USERS.scalars(session, select(User).where(User.id.in_(granted.where(Grant.role == role))), request)
    visible = or_(User.id.in_(granted), User.server_wide.is_(True)) if server_wide else User.id.in_(granted)
    return USERS.scalars(session, select(User).where(visible), request)


def grants(session: Session, user_id: str) -> dict[str, str]:
    """A user's roles by fleet."""
    query = select(Grant.fleet_id, Grant.role).where(Grant.user_id == user_id).order_by(Grant.fleet_id)
    return {row[0]: row[1] for row in session.execute(query)}


def delete_user(session: Session, found: User) -> None:
    """Remove a user with roles and sessions."""
    end_sessions(session, found.id)
    session.execute(delete(Grant).where(Grant.user_id == found.id))
    session.delete(found)
    session.flush()


def events_page(
    session: Session,
    fleet_id: str,
    request: PageRequest,
    *,
    actor: str | None,
    action: str | None,
    subject: str | None,
) -> Rows[AuditEvent]:
    """A page of events; a `*` in what they are narrowed by stands for any characters."""
    query = select(AuditEvent).where(AuditEvent.fleet_id == fleet_id)
    narrowed = ((AuditEvent.actor, actor), (AuditEvent.action, action), (AuditEvent.subject, subject))
    for column, text in narrowed:
        if text is not None:
            query = query.where(matches(column, text))
    return EVENTS.scalars(session, query, request)


def events_until(session: Session, fleet_id: str, sequence: int | None) -> Iterator[AuditEvent]:
    """Every event of a fleet, up to one where it is given, by sequence; read in pieces."""
    query = select(AuditEvent).where(AuditEvent.fleet_id == fleet_id).order_by(AuditEvent.sequence)
    if sequence is not None:
        query = query.where(AuditEvent.sequence <= sequence)
    yield from session.scalars(query.execution_options(yield_per=1000))


def audit_head(session: Session, fleet_id: str) -> AuditHead | None:
    """The newest link of a fleet's chain."""
    return session.get(AuditHead, fleet_id)
