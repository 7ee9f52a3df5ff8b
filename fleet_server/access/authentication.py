"""Who a request comes from: by the admin's token, a service token, a session, or a token of the OpenID provider.

Each function that takes a session works in its caller's transaction.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sqlalchemy.orm import Session

from fleet_server import audit
from fleet_server.access import repository, secret_tokens
from fleet_server.access.limits import GuessBrake
from fleet_server.access.oidc import OidcVerifier, Person
from fleet_server.access.passwords import verify_password
from fleet_server.access.schemas import Login
from fleet_server.access.schemas import Session as SessionView
from fleet_server.db import Database
from fleet_server.errors import ForbiddenError, TooManyRequestsError, UnauthorizedError
from fleet_server.models import AccessToken, User
from fleet_server.principals import DEFAULT_FLEET, Actor, Principal, Role
from fleet_server.settings import EVERY_FLEET

USED_EVERY = dt.timedelta(minutes=5)  # how coarse the time of last use is
ADMIN = "admin"


@dataclass(frozen=True)
class Proof:
    """What a request brings to prove who sent it: its Authorization header, and the fleet that it is for."""

    authorization: str | None
    fleet_id: str | None


def authenticate(
    database: Database, admin_token: str, proof: Proof, now: dt.datetime, oidc: OidcVerifier | None = None
) -> Principal:
    """The principal of a request.

    Args:
        database: with fleets, users and tokens.
        admin_token: of the settings.
        proof: what the request brings.
        now: the time.
        oidc: who checks tokens of the OpenID provider, where there is one.

    Raises:
        UnauthorizedError: when the token is none, is over, or was revoked.
        ForbiddenError: when the principal may not act in the fleet that the request names, or in none.
        UnavailableError: when the OpenID provider would have to answer, and does not.
    """
    scheme, _, text = (proof.authorization or "").partition(" ")
    if scheme.lower() != "bearer":
        raise _refused(
            "send `Authorization: Bearer <token>`; the command line takes it from SHOAL_TOKEN or `shoal login`"
        )
    if secrets.compare_digest(text.encode(), admin_token.encode()):
        with database.read() as session:
            fleet_id = _chosen(session, proof.fleet_id or DEFAULT_FLEET)
        return Principal(ADMIN, ADMIN, Role.ADMIN, fleet_id, server_wide=True)
    if oidc is not None and text.count(".") == 2:  # of the JWS compact serialization; none of our own has one
        person = oidc.identify(text, now)
        with database.read() as session:
            return _of_person(session, person, proof)
    parts = secret_tokens.parse(text)
    with database.read() as session:
        token = repository.token(session, parts[0]) if parts else None
        if parts is None or token is None or not secret_tokens.matches(parts[1], token.digest):
            raise _refused("the token is none of this server: log in, or ask an admin for another")
        if token.revoked_at is not None or token.expires_at <= now:
            what = "is over" if token.user_id else "was revoked" if token.revoked_at else "has expired"
            raise _refused(f"the {'session' if token.user_id else 'token'} {what}: log in, or ask an admin for another")
        principal = _of_user(session, token, proof) if token.user_id else _of_service(session, token, proof)
    if token.last_used_at is None or now - token.last_used_at >= USED_EVERY:
        with database.write() as session:
            repository.touch_token(session, token.id, now)
    return principal


def _refused(detail: str) -> UnauthorizedError:
    return UnauthorizedError("not_authenticated", detail)


def _of_service(session: Session, token: AccessToken, proof: Proof) -> Principal:
    name = f"token/{token.name}"
    if token.fleet_id is None:
        fleet_id = _chosen(session, proof.fleet_id or DEFAULT_FLEET)
    elif proof.fleet_id in {None, token.fleet_id}:
        fleet_id = token.fleet_id
    else:
        raise _not_yours(str(proof.fleet_id))
    wide = token.fleet_id is None and token.role == Role.ADMIN.value
    return Principal(f"token/{token.id}", name, Role(token.role), fleet_id, server_wide=wide, token_id=token.id)


def _of_user(session: Session, token: AccessToken, proof: Proof) -> Principal:
    user = session.get_one(User, token.user_id)
    roles = repository.grants(session, user.id)
    name, key = f"user/{user.name}", f"user/{user.id}"
    if user.server_wide:
        fleet_id = _chosen(session, proof.fleet_id or DEFAULT_FLEET)
        return Principal(key, name, Role.ADMIN, fleet_id, server_wide=True, token_id=token.id)
    fleet_id = proof.fleet_id or home_fleet(roles)
    if fleet_id not in roles:
        raise _not_yours(fleet_id)
    return Principal(key, name, Role(roles[fleet_id]), fleet_id, token_id=token.id)


def _of_person(session: Session, person: Person, proof: Proof) -> Principal:
    if not person.roles:
        raise ForbiddenError(
            "no_role",
            f"{person.name} is known to the OpenID provider, and nothing there gives a role here: ask an admin to put "
            "one of your groups into SHOAL_OIDC_ROLES, or you into one of those",
        )
    everywhere = person.roles.get(EVERY_FLEET)
    fleet_id = proof.fleet_id or (DEFAULT_FLEET if everywhere else home_fleet(person.roles))
    role = person.role_in(fleet_id)
    if role is None or fleet_id == EVERY_FLEET:
        raise _not_yours(fleet_id)
    wide = everywhere is Role.ADMIN
    return Principal(person.id, person.name, role, _chosen(session, fleet_id), server_wide=wide)


def home_fleet(roles: Mapping[str, str]) -> str:
    """Where a user acts who names no fleet: the default one where they have a role there, else their first."""
    return DEFAULT_FLEET if DEFAULT_FLEET in roles else next(iter(roles), DEFAULT_FLEET)


def _chosen(session: Session, fleet_id: str) -> str:
    if "\0" in fleet_id or repository.fleet(session, fleet_id) is None:
        raise _not_yours(fleet_id)
    return fleet_id


def _not_yours(fleet_id: str) -> ForbiddenError:
    """The same whether the fleet is there or not."""
    return ForbiddenError(
        "fleet_not_yours", f"X-Shoal-Fleet: there is no fleet {fleet_id!r} where you have a role: see `shoal whoami`"
    )


def network_of(address: str) -> str:
    """Whom an address is counted as: itself, or, in IPv6, its /64, of which one host has every address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else address


class LoginDesk:
    """Logs users in, and slows down who guesses: by the name that is tried, and by the address that tries.

    Args:
        lifetime: of a session.
        monotonic: a clock in seconds.
    """

    def __init__(self, lifetime: dt.timedelta, monotonic: Callable[[], float]) -> None:
        self._lifetime = lifetime
        self._monotonic = monotonic
        self._names = GuessBrake()
        self._addresses = GuessBrake(free=20)
        self._lock = threading.Lock()

    def log_in(self, database: Database, wanted: Login, origin: Actor, now: dt.datetime) -> SessionView:
        """A session for a name and its password.

        Raises:
            UnauthorizedError: the same, after the same time, for a wrong name and a wrong password.
            TooManyRequestsError: when too many were wrong before.
        """
        network, moment = network_of(origin.address), self._monotonic()
        with self._lock:
            wait = max(self._names.wait_s(wanted.name, moment), self._addresses.wait_s(network, moment))
            if wait <= 0:
                self._names.failed(wanted.name, moment)  # before it is known, or many at once would go uncounted
        if wait > 0:
            raise TooManyRequestsError(
                "too_many_guesses", f"too many wrong passwords: try again in {wait:.0f} s", retry_after_s=wait
            )
        with database.read() as session:
            user = repository.user(session, wanted.name)
        if not verify_password(user.password_hash if user else None, wanted.password) or user is None:
            with self._lock:
                self._addresses.failed(network, moment)
            raise UnauthorizedError("wrong_login", "name or password is wrong: try again, or ask an admin")
        with self._lock:
            self._names.succeeded(wanted.name)
        with database.write() as session:
            return self._open(session, user, origin, now)

    def _open(self, session: Session, user: User, origin: Actor, now: dt.datetime) -> SessionView:
        repository.sweep_sessions(session, now)
        minted, expires_at = secret_tokens.mint(), now + self._lifetime
        name, roles = f"user/{user.name}", repository.grants(session, user.id)
        session.add(
            AccessToken(id=minted.id, digest=minted.digest, user_id=user.id, created_by=name, expires_at=expires_at)
        )
        actor = Actor(name, f"user/{user.id}", origin.address, origin.request_id)
        audit.record(session, fleet_id=home_fleet(roles), actor=actor, action="session.open", subject=name)
        return SessionView(
            token=minted.text,
            expires_at=expires_at,
            name=user.name,
            server_wide=user.server_wide,
            roles={fleet_id: Role(role) for fleet_id, role in roles.items()},
        )
