"""The check that stands before every endpoint: who asks, in which fleet, and whether they may."""

from __future__ import annotations

from fastapi import Request

from fleet_server.access import policy
from fleet_server.access.authentication import Proof, authenticate
from fleet_server.db import utc_now
from fleet_server.http import Db


def authorize(request: Request, database: Db) -> None:
    """Dependency of every router below `/api/v1`; leaves the principal at the request.

    Raises:
        UnauthorizedError: when the request does not prove who sent it.
        ForbiddenError: when its principal may not do this.
    """
    action = request.scope["route"].name
    if action in policy.PUBLIC:
        return
    proof = Proof(request.headers.get("Authorization"), request.headers.get("X-Shoal-Fleet"))
    principal = authenticate(database, request.app.state.admin_token, proof, utc_now())
    policy.check(principal, action)
    request.state.principal = principal
