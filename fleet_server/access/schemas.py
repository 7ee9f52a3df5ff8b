"""HTTP shapes of login, users, tokens, fleets and the audit log."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

from pydantic import Field

from fleet_server.principals import Role
from fleet_server.schemas import Name, Request, Response, example

Password = Annotated[str, Field(min_length=12, max_length=256, description="12 to 256 characters.")]


class Login(Request):
    """A name and its password."""

    model_config = example(name="ada", password="correct horse battery staple")  # noqa: S106 (an example)

    name: str = Field(max_length=64)
    password: str = Field(max_length=256)


class OidcClient(Response):
    """Where and as which client to log in by OpenID Connect."""

    issuer: str = Field(description="Its discovery document names everything else.")
    client_id: str = Field(description="The audience that a token must have.")


class LoginView(Response):
    """How people log in here, besides by name and password."""

    oidc: OidcClient | None = Field(description="Send the provider's ID token as `Authorization: Bearer …`.")


class Session(Response):
    """A session of a user."""

    token: str = Field(description="Send it as `Authorization: Bearer …`.")
    expires_at: dt.datetime
    name: str
    server_wide: bool
    roles: dict[str, Role] = Field(description="By fleet.")


class Me(Response):
    """Who the caller is, and as what they act."""

    name: str
    fleet: str
    role: Role
    server_wide: bool


class FleetCreate(Request):
    """A new fleet."""

    model_config = example(id="plant7")

    id: Name


class FleetView(Response):
    """A fleet: a tenant with its own devices, models, rollouts, users and tokens."""

    id: str
    approvals: int = Field(description="How many others must approve a rollout before it starts.")
    created_at: dt.datetime


class FleetUpdate(Request):
    """What to change of a fleet; absent fields stay as they are."""

    model_config = example(approvals=1)

    approvals: int | None = Field(
        None, ge=0, le=10, description="How many others than its creator must approve a new rollout; 0: it starts."
    )


class UserCreate(Request):
    """A new user with a role in the caller's fleet."""

    model_config = example(name="ada", password="correct horse battery staple", role="releaser")  # noqa: S106 (an example)

    name: Name
    password: Password
    role: Role
    server_wide: bool = Field(False, description="Admin of every fleet; only such an admin may make another.")


class UserUpdate(Request):
    """What to change of a user; absent fields stay as they are."""

    model_config = example(role="operator")

    role: Role | None = Field(None, description="In the caller's fleet.")
    password: Password | None = Field(None, description="Ends the user's sessions.")


class UserView(Response):
    """A user, as the caller's fleet sees them."""

    name: str
    role: Role | None = Field(description="In the caller's fleet.")
    server_wide: bool
    created_at: dt.datetime


class TokenCreate(Request):
    """A new service token of the caller's fleet."""

    model_config = example(name="ci", role="operator", days=90)

    name: Name
    role: Role
    days: int = Field(90, ge=1, le=3650, description="How long it holds, in days.")
    server_wide: bool = Field(False, description="For every fleet; only a server-wide admin may make one.")


class TokenView(Response):
    """A service token, without its secret."""

    observed = frozenset({"last_used_at"})

    id: str
    name: str
    role: Role
    server_wide: bool
    created_by: str
    created_at: dt.datetime
    expires_at: dt.datetime
    revoked_at: dt.datetime | None
    last_used_at: dt.datetime | None = Field(description="To within five minutes.")


class NewToken(TokenView):
    """A new service token with its secret."""

    token: str = Field(description="Shown this once; the server keeps only its hash.")


class AuditEventView(Response):
    """One thing that was done."""

    id: str
    sequence: int = Field(description="Its place in the fleet's chain, from 1.")
    at: dt.datetime
    actor: str
    address: str = Field(description="Where the request came from; empty for devices and the server.")
    request_id: str = Field(description="Under which the server's log has the request.")
    action: str
    subject: str
    detail: dict[str, Any]
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    previous_hash: str
    hash: str = Field(description="SHA-256 over `previous_hash` and the canonical JSON of the rest.")


class BreakView(Response):
    """Where a chain breaks first."""

    sequence: int
    reason: str


class AuditVerification(Response):
    """Whether the audit log is whole."""

    whole: bool
    events: int
    hash: str = Field(description="Of the newest event: kept elsewhere, it shows later that nothing was cut off.")
    broken: BreakView | None
