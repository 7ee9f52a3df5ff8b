"""Wires the parts of the fleet server: the HTTP application, and everything that runs beside it."""

from __future__ import annotations

import datetime as dt
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import SQLAlchemyError

from fleet_server import migrations
from fleet_server.access import endpoints as access
from fleet_server.access.authentication import LoginDesk
from fleet_server.access.authorization import ForgetsOnChange, RequestLimits, authorize
from fleet_server.access.bootstrap import bootstrap_token
from fleet_server.access.known import KnownPrincipals
from fleet_server.access.oidc import OidcVerifier
from fleet_server.addresses import is_loopback
from fleet_server.agent_releases import endpoints as agent_releases
from fleet_server.alerts import endpoints as alerts
from fleet_server.alerts.keeper import AlertKeeper
from fleet_server.alerts.mail import AlertMailer
from fleet_server.catalog import endpoints as catalog
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.clock import utc_now
from fleet_server.commands import endpoints as commands
from fleet_server.commands.keeper import CommandKeeper
from fleet_server.commands.streaming import Streams
from fleet_server.conversions import endpoints as conversions
from fleet_server.conversions.inspector import ProcessInspector
from fleet_server.conversions.scheduler import ConversionScheduler
from fleet_server.conversions.sharder import ProcessSharder
from fleet_server.db import Database
from fleet_server.deltas.maker import DeltaMaker
from fleet_server.devices import endpoints as devices
from fleet_server.draining import ClosedConnections, Drain
from fleet_server.drift import endpoints as drift
from fleet_server.enrolment import endpoints as enrolment
from fleet_server.enrolment.service import Authority
from fleet_server.errors import UnavailableError
from fleet_server.gates import endpoints as gates
from fleet_server.gates.keeper import GateKeeper
from fleet_server.gateway.service import Gateway
from fleet_server.idempotency import add_idempotency, claim_key
from fleet_server.inferences import endpoints as inferences
from fleet_server.inferences.service import Desk
from fleet_server.instruments import Instruments
from fleet_server.metrics import endpoints as metrics
from fleet_server.metrics.figures import FigureCollector, Figures
from fleet_server.metrics.observing import RequestTimer, RequestTracer, time_statements
from fleet_server.metrics.otlp import MetricsPusher
from fleet_server.models import Fleet
from fleet_server.openapi import PUBLIC, describe, operation_name
from fleet_server.otlp import SpanExporter, Targets, targets
from fleet_server.overview import endpoints as overview
from fleet_server.overview.keeper import OverviewKeeper
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.problems import add_problems
from fleet_server.rollouts import endpoints as rollouts
from fleet_server.rollouts.engine import RolloutEngine
from fleet_server.rollouts.reminder import Reminder
from fleet_server.routes import known_parameters
from fleet_server.samples import endpoints as samples
from fleet_server.samples.keeper import SampleKeeper
from fleet_server.seat import Seat
from fleet_server.secure_headers import SecureHeaders
from fleet_server.servers import Common, Membership
from fleet_server.settings import Settings
from fleet_server.shards import endpoints as shards
from fleet_server.shards.keeper import ShardKeeper
from fleet_server.short_way import ShortWay
from fleet_server.telemetry import endpoints as telemetry
from fleet_server.telemetry.keeper import TelemetryKeeper
from fleet_server.trust import endpoints as trust
from fleet_server.trust.ca import FleetCa
from fleet_server.trust.keeper import TrustKeeper
from fleet_server.trust.tickets import TicketDesk
from fleet_server.web import add_pages
from fleet_server.webhooks import endpoints as webhooks
from fleet_server.webhooks.keeper import WebhookKeeper

log = logging.getLogger(__name__)
DESCRIPTION = """\
Shoal takes one trained model and makes a fleet of unlike devices run it well.

1. **Devices** register themselves and report facts; **profiles** name kinds of device by a match over those facts.
2. Push a **model version**: upload its files and data sets, then create the version with their digests.
3. Build its **variants**, one a profile: converted, measured, and judged by the gate.
4. Start a **gate run**: devices of the profile measure the candidates, and the best one there is picked.
5. Create a **rollout**: devices get the variant of their profile in stages, judged by what they report.
6. Read **telemetry**: latency, errors and accuracy as the devices had them.

Every request but those to `/api/v1/login` carries a bearer token. It acts in one fleet, with one role: a **viewer**
reads; an **operator** handles devices, profiles, models, variants and gate runs; a **releaser** also creates and
controls rollouts; an **admin** manages users, tokens and the fleet. What belongs to another fleet is not found.

Errors are problem documents (RFC 9457) with a stable `code`, a `detail` that ends in the remedy, and the fields at
fault in `problems`. Lists are paged, sorted by `sort`, and narrowed by filters: pass `next_cursor` as `cursor`, or
follow the `Link` header (RFC 8288). What is read has an `ETag`; give it back as `If-None-Match` to be spared what you
have, and as `If-Match` to change only what you saw. A POST with an `Idempotency-Key` may be sent twice and acts once.
"""
TAGS = [
    {"name": "devices", "description": "Machines with an agent: what they are, and what runs on them."},
    {"name": "enrolment", "description": "How devices get their certificates, and how they are locked out."},
    {"name": "profiles", "description": "Kinds of device: a match over facts, a runtime, precisions, budgets."},
    {"name": "models", "description": "Named models, their immutable versions, and uploads."},
    {"name": "variants", "description": "Versions converted for profiles, with measurements and the gate's verdict."},
    {"name": "gate runs", "description": "Variants measured on devices of their profile, and judged by that."},
    {"name": "rollouts", "description": "Moving devices to a version in stages, with stop rules."},
    {"name": "overview", "description": "How the whole fleet is, and what would be done next."},
    {"name": "telemetry", "description": "What models and devices did, as the devices measured it."},
    {"name": "commands", "description": "What devices are asked to do at once: restart, logs, benchmark and more."},
    {"name": "inferences", "description": "Asking the devices that serve a model, as if they were one."},
    {"name": "samples", "description": "Rows that models were least sure of: kept on devices, sent when asked for."},
    {"name": "alerts", "description": "Rules over what the fleet says, what came of them, and who is told."},
    {"name": "webhooks", "description": "Events told by HTTP, signed and tried again, and what nobody took."},
    {"name": "access", "description": "Login, users, service tokens and fleets: who may do what, and where."},
    {"name": "trust", "description": "What devices may run: signed manifests, and whose signatures wait."},
    {"name": "audit", "description": "What was done, and by whom."},
    {"name": "health", "description": "Whether this server works."},
]


def create_app(settings: Settings) -> FastAPI:
    """The HTTP application; it answers once it is `running`."""
    app = FastAPI(
        title="Shoal fleet server",
        version="1",
        summary="Convert, gate, roll out and watch models on a fleet of unlike devices.",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=operation_name,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours are metrics.observing and spans
    )
    app.state.settings = settings
    app.add_middleware(ShortWay, state=app.state)
    app.add_middleware(SecureHeaders)
    app.state.drain = Drain()
    app.add_middleware(ClosedConnections, drain=app.state.drain)
    app.state.instruments = Instruments()
    app.state.request_limits = RequestLimits(settings, time.monotonic)
    app.state.known_principals = KnownPrincipals(time.monotonic)
    app.add_middleware(ForgetsOnChange, known=app.state.known_principals)
    app.state.login_desk = LoginDesk(dt.timedelta(hours=settings.session_hours), time.monotonic)
    app.state.oidc = OidcVerifier.of(settings, time.monotonic)
    api = APIRouter(
        prefix="/api/v1",
        dependencies=[Depends(authorize), Depends(known_parameters), Depends(claim_key)],
        max_body_size=settings.request_max_mb << 20,
    )
    subjects = (
        overview, devices, catalog, conversions, gates, rollouts, telemetry, drift, commands, inferences, samples,
        alerts, enrolment, trust, webhooks, access, shards, agent_releases,
    )  # fmt: skip
    for subject in subjects:
        api.include_router(subject.router)
    api.include_router(rollouts.device_router)
    api.include_router(rollouts.profile_router)
    api.include_router(enrolment.public)
    app.include_router(api)
    app.include_router(_health)
    app.include_router(metrics.router)
    add_pages(app)
    describe(app)
    add_idempotency(app)
    add_problems(app, loopback_only=is_loopback(settings.host), body_limit=settings.request_max_mb << 20)
    app.add_middleware(RequestTracer)
    app.add_middleware(RequestTimer, instruments=app.state.instruments)
    return app


@contextmanager
def running(app: FastAPI) -> Iterator[None]:
    """Every other part of the server, started for the application and stopped at the end.

    Raises:
        FleetError: when a part can't start; those before it are stopped again.
    """
    with ExitStack() as stack:
        _start(app, stack)
        yield


def _start(app: FastAPI, stack: ExitStack) -> None:
    """Start part after part; the stack undoes what was started, in reverse, also when a later one fails."""
    settings: Settings = app.state.settings
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        migrations.upgrade(settings.effective_database_url)
    except OSError as error:
        detail = f"the state folder {settings.state_dir} can't be used ({error.strerror}): set SHOAL_STATE_DIR"
        raise UnavailableError("state_dir", detail) from None
    except SQLAlchemyError as error:
        detail = f"the database does not answer ({str(error)[:300]}): see SHOAL_DATABASE_URL"
        raise UnavailableError("database", detail) from None
    given = settings.admin_token
    app.state.admin_token = given.get_secret_value() if given else bootstrap_token(settings.state_dir)
    exported = targets(settings.otlp_endpoint, os.environ, metrics=settings.otlp_metrics)
    app.state.spans = exporter = _exporter(exported, stack)
    export = exporter.export if exporter is not None else None
    seat = Seat(settings.state_dir)
    stack.callback(seat.close)
    database = Database(settings.effective_database_url, export, owner=seat.name)
    stack.callback(database.dispose)
    instruments: Instruments = app.state.instruments
    time_statements(database.engine, instruments)
    app.state.figures = Figures(database)
    counted = FigureCollector(app.state.figures, utc_now)
    instruments.registry.register(counted)
    stack.callback(instruments.registry.unregister, counted)
    if exported.metrics:
        pusher = MetricsPusher(
            instruments.registry, exported.of("metrics"), socket.gethostname(), settings.otlp_interval_s
        )
        stack.callback(pusher.stop)
        pusher.start()
    with database.write() as session:
        if session.get(Fleet, DEFAULT_FLEET) is None:
            session.add(Fleet(id=DEFAULT_FLEET))
    artifacts = ArtifactStore.open(settings.artifacts_url, folder=settings.state_dir / "artifacts")
    ca = FleetCa.open(settings.state_dir / "ca", DEFAULT_FLEET, certificate=settings.ca_cert, key=settings.ca_key)
    authority = Authority(ca, dt.timedelta(days=settings.certificate_days), settings.pending_enrolments)
    app.state.authority, app.state.enrolment_gate = authority, enrolment.EnrolmentGate()
    app.state.tickets = TicketDesk(ca)
    membership = Membership(database, seat.name, _common(settings, ca))
    membership.join()
    gateway = Gateway(settings, database, artifacts, authority, instruments, export, membership)
    parts = (
        TrustKeeper(database, settings),
        gateway,
        ConversionScheduler(database, artifacts, settings),
        DeltaMaker(database, artifacts, settings),
        RolloutEngine(database, settings),
        Reminder(database, settings),
        GateKeeper(database, settings),
        SampleKeeper(database, artifacts, settings),
        AlertKeeper(database, settings),
        AlertMailer(database, settings),
        CommandKeeper(database, settings),
        WebhookKeeper(database, settings),
        TelemetryKeeper(database, settings),
        OverviewKeeper(database, settings),
        ShardKeeper(database, settings),
    )
    app.state.database, app.state.artifacts, app.state.gateway = database, artifacts, gateway
    app.state.inference_desk = Desk(database, gateway.dispatch)
    app.state.inspector, app.state.sharder = ProcessInspector(artifacts, settings), ProcessSharder(artifacts, settings)
    app.state.log_streams = Streams(database)
    stack.callback(app.state.log_streams.stop)
    for part in parts:
        stack.callback(part.stop)
        part.start()


def _exporter(exported: Targets, stack: ExitStack) -> SpanExporter | None:
    """Where spans go; closed with the rest."""
    if not exported.traces:
        return None
    exporter = SpanExporter(exported.of("traces"), "shoal-server", socket.gethostname())
    stack.callback(exporter.close)
    return exporter


def _common(settings: Settings, ca: FleetCa) -> Common:
    """What other servers of the database must have too."""
    return Common(ca.pin, settings.effective_artifacts_url, broker=settings.broker_url is not None)


_health = APIRouter(tags=["health"])


class Readiness(BaseModel):
    """Whether everything answers, and what does not."""

    ready: bool
    missing: list[str] = Field(examples=[["broker"]])


@_health.get("/healthz", summary="Whether the process lives", openapi_extra=PUBLIC)
def healthz() -> dict[str, str]:
    """Answers as long as the process does."""
    return {"status": "ok"}


@_health.get(
    "/readyz",
    summary="Whether the server can work",
    response_model=Readiness,
    openapi_extra=PUBLIC,
    responses={503: {"model": Readiness, "description": "Something does not answer"}},
)
def readyz(request: Request) -> JSONResponse:
    """503 lists what does not answer: `database`, `broker` or `artifacts`; or `server`, which is about to end."""
    state = request.app.state

    def database() -> None:
        with state.database.read() as session:
            session.get(Fleet, DEFAULT_FLEET)

    def broker() -> None:
        if not state.gateway.connected:
            raise ConnectionError

    missing = [
        name
        for name, check in (("database", database), ("broker", broker), ("artifacts", state.artifacts.check))
        if not _works(check)
    ]
    if state.drain.begun:
        missing.append("server")
    return JSONResponse({"ready": not missing, "missing": missing}, status_code=503 if missing else 200)


def _works(check: Callable[[], None]) -> bool:
    try:
        check()
    except Exception as error:  # noqa: BLE001 (whatever it is, the part does not work)
        log.warning("not ready: %s", error)
        return False
    return True
