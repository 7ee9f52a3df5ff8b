"""`GET /metrics`: what Prometheus scrapes. Who may read it is a setting, `SHOAL_METRICS`.

A reader on the same machine, or a server-wide admin's token, gets everything; the token of a fleet gets that fleet's
figures alone. What came through a proxy came from elsewhere, even where the proxy is on this machine.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from fleet_server.access.authentication import Proof, authenticate
from fleet_server.access.authorization import RequestLimits
from fleet_server.addresses import is_loopback
from fleet_server.clock import utc_now
from fleet_server.errors import FleetError, NotFoundError
from fleet_server.http import AppSettings, Db
from fleet_server.instruments import Instruments
from fleet_server.metrics.figures import FigureCollector, Figures
from fleet_server.settings import MetricsAccess

router = APIRouter(include_in_schema=False)
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


@router.get("/metrics")
def read_metrics(request: Request, database: Db, settings: AppSettings) -> Response:
    """Prometheus' text format, or OpenMetrics for who asks for it."""
    fleet_id = _reads(request, database, settings.metrics)
    figures: Figures = request.app.state.figures
    if fleet_id is None:
        instruments: Instruments = request.app.state.instruments
        registry = instruments.registry
    else:
        registry = CollectorRegistry()
        registry.register(FigureCollector(figures, utc_now, fleet_id))
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"Content-Type": content_type, "Cache-Control": "no-store"})


def _reads(request: Request, database: Db, access: MetricsAccess) -> str | None:
    """The fleet whose figures the request may read; None for all and everything.

    Raises:
        FleetError: when it may read nothing.
    """
    if access == "off":
        raise NotFoundError("page", "/metrics", remedy="set SHOAL_METRICS to loopback, token or open")
    limits: RequestLimits = request.app.state.request_limits
    address = request.client.host if request.client else ""
    given = request.headers.get("Authorization")
    if given is None and (access == "open" or (access == "loopback" and _is_near(request, address))):
        limits.count_address(address)
        return None
    proof = Proof(given, request.headers.get("X-Shoal-Fleet"))
    state = request.app.state
    try:
        principal = authenticate(database, state.admin_token, proof, utc_now(), state.oidc)
    except FleetError:
        limits.count_address(address)
        raise
    limits.count_principal(principal.id)
    return None if principal.server_wide and proof.fleet_id is None else principal.fleet_id


def _is_near(request: Request, address: str) -> bool:
    return is_loopback(address) and not any(name in request.headers for name in FORWARDED)
