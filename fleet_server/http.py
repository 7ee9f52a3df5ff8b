"""What every endpoint shares: sessions, who calls, and in which fleet. It knows HTTP and no subject.

A writing session commits when the endpoint function ends and before the answer is sent (FastAPI's `scope="function"`),
so that a client that has its answer can rely on it.

What waits for nothing is `async`: FastAPI calls all else in a thread of its pool, and going there and back takes longer
than most of what is done here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

from fastapi import Depends, Path, Request
from sqlalchemy.orm import Session

from fleet_server.db import Database
from fleet_server.errors import FleetError
from fleet_server.principals import Actor as ActorOfRequest
from fleet_server.principals import Principal
from fleet_server.schemas import Digest, Name
from fleet_server.settings import Settings


async def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _read_session(request: Request) -> Iterator[Session]:
    database: Database = request.app.state.database
    with database.read() as session:
        yield session


def _write_session(request: Request) -> Iterator[Session]:
    database: Database = request.app.state.database
    with database.write() as session:
        request.state.write_session = session  # for who writes the answer beside the change
        yield session


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _checked(request: Request) -> Principal:
    principal: Principal | None = getattr(request.state, "principal", None)
    if principal is None:
        raise FleetError("not_checked", "this endpoint does not check who asks, so nobody may: report this defect")
    return principal


async def current_principal(request: Request) -> Principal:
    """Who sent the request, as the check before every endpoint found out.

    Raises:
        FleetError: where there was no such check: then nobody may.
    """
    return _checked(request)


async def _fleet_id(request: Request) -> str:
    return _checked(request).fleet_id


def _origin(request: Request) -> ActorOfRequest:
    address = request.client.host if request.client else ""
    return ActorOfRequest("", "", address, request.state.request_id)


async def origin(request: Request) -> ActorOfRequest:
    """Where a request comes from, when it is not known from whom."""
    return _origin(request)


async def _actor(request: Request) -> ActorOfRequest:
    principal = _checked(request)
    return replace(_origin(request), name=principal.name, id=principal.id)


ReadSession = Annotated[Session, Depends(_read_session, scope="function")]
WriteSession = Annotated[Session, Depends(_write_session, scope="function")]
Db = Annotated[Database, Depends(_database)]
AppSettings = Annotated[Settings, Depends(_settings)]
FleetId = Annotated[str, Depends(_fleet_id)]
Actor = Annotated[ActorOfRequest, Depends(_actor)]
Origin = Annotated[ActorOfRequest, Depends(origin)]
CurrentPrincipal = Annotated[Principal, Depends(current_principal)]
DeviceId = Annotated[str, Path(description="The device's id.", examples=["camera-01"])]
ProfileName = Annotated[str, Path(description="The profile's name.", examples=["rpi5-litert"])]
ModelName = Annotated[str, Path(description="The model's name.", examples=["mnist"])]
NewModelName = Annotated[Name, Path(description="The model's name; it is made when it is not there.")]
ArtifactDigest = Annotated[Digest, Path()]
VersionName = Annotated[str, Path(description="The version's name within its model.", examples=["2"])]
VariantId = Annotated[str, Path(description="The variant's id.")]
RolloutId = Annotated[str, Path(description="The rollout's id.")]
