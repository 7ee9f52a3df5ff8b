"""The check that stands before every endpoint: who asks, how often, in which fleet, and whether they may."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.protocol.logs import note_ids
from fleet_server.access import policy
from fleet_server.access.authentication import Proof, authenticate, network_of
from fleet_server.access.known import KnownPrincipals
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.errors import FleetError, TooManyRequestsError
from fleet_server.http import Db
from fleet_server.principals import Principal
from fleet_server.rates import KeyedBuckets
from fleet_server.settings import Settings

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class RequestLimits:
    """How often principals may ask, and addresses that prove nothing. Thread-safe.

    Args:
        settings: with rates and bursts.
        monotonic: a clock in seconds.
    """

    def __init__(self, settings: Settings, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._principals = KeyedBuckets(settings.request_rate, settings.request_burst)
        self._addresses = KeyedBuckets(settings.anonymous_rate, settings.anonymous_burst)

    def count_principal(self, principal_id: str) -> None:
        """Count a request of a principal.

        Raises:
            TooManyRequestsError: when it is one too many.
        """
        self._take(self._principals, principal_id)

    def count_address(self, address: str) -> None:
        """Count a request that proves nothing, by its address.

        Raises:
            TooManyRequestsError: when it is one too many.
        """
        self._take(self._addresses, network_of(address))

    def _take(self, buckets: KeyedBuckets, key: str) -> None:
        with self._lock:
            now = self._monotonic()
            bucket = buckets.of(key, now)
            wait = 0.0 if bucket.take(1, now) else bucket.wait_s(1, now)
        if wait > 0:
            raise TooManyRequestsError(
                "too_many_requests", f"too many requests: try again in {wait:.1f} s", retry_after_s=wait
            )


async def authorize(request: Request, database: Db) -> None:
    """Dependency of every router below `/api/v1`; leaves the principal at the request.

    Raises:
        UnauthorizedError: when the request does not prove who sent it.
        ForbiddenError: when its principal may not do this.
        UnavailableError: when the OpenID provider would have to answer, and does not.
        TooManyRequestsError: when they ask too often.
    """
    action = request.scope["route"].name
    limits: RequestLimits = request.app.state.request_limits
    address = request.client.host if request.client else ""
    if action in policy.PUBLIC:
        if action not in policy.SELF_BOUNDED:
            limits.count_address(address)
        return
    proof = Proof(request.headers.get("Authorization"), request.headers.get("X-Shoal-Fleet"))
    try:
        principal = await identify(request.app.state, database, proof)
    except FleetError:
        limits.count_address(address)
        raise
    limits.count_principal(principal.id)
    policy.check(principal, action)
    request.state.principal = principal
    note_ids(fleet=principal.fleet_id)


async def identify(state: State, database: Database, proof: Proof) -> Principal:
    """The principal of a request, as the database says now or said a moment ago.

    Args:
        state: of the application.
        database: with fleets, users and tokens.
        proof: what the request brings.

    Raises:
        FleetError: as `authenticate` does.
    """
    known: KnownPrincipals = state.known_principals
    principal = known.get(proof)
    if principal is None:
        forgotten = known.forgotten
        principal = await run_in_threadpool(authenticate, database, state.admin_token, proof, utc_now(), state.oidc)
        known.keep(proof, principal, forgotten)
    return principal


class ForgetsOnChange:
    """ASGI middleware: what a request may have changed of rights holds by the time that its sender has the answer.

    Args:
        app: what it stands before.
        known: to forget.
    """

    def __init__(self, app: ASGIApp, known: KnownPrincipals) -> None:
        self._app = app
        self._known = known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] in SAFE:
            await self._app(scope, receive, send)
            return

        async def forgetting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._known.forget()
            await send(message)

        await self._app(scope, receive, forgetting)
