"""Every query over releases of the agent."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from fleet_server.models import Device, Model, Profile, Variant, Version
from fleet_server.paging import PageRequest, Rows, TableList

AGENT_KIND, PLATFORM_KIND = "agent", "platform"
RELEASES = TableList(
    Version.id,
    {"created_at": Version.id, "version": Version.name},
    default="-created_at",
    name=Version.name,
    time=Version.created_at,
)


def agent(session: Session, fleet_id: str) -> Model | None:
    """The row whose versions the releases are; None before the first."""
    return session.scalar(select(Model).where(Model.fleet_id == fleet_id, Model.kind == AGENT_KIND))


def release(session: Session, fleet_id: str, version: str) -> Version | None:
    """A release by its version."""
    return session.scalar(_releases(fleet_id).where(Version.name == version))


def page_of(session: Session, fleet_id: str, request: PageRequest) -> Rows[Version]:
    """A page of releases."""
    return RELEASES.scalars(session, _releases(fleet_id), request)


def bundles(session: Session, version_id: str) -> list[tuple[Variant, Profile]]:
    """A release's bundles with their platforms, by name."""
    query = select(Variant, Profile).join(Profile, Profile.id == Variant.profile_id)
    rows = session.execute(query.where(Variant.version_id == version_id).order_by(Profile.name))
    return [(row[0], row[1]) for row in rows]


def platform(session: Session, fleet_id: str, name: str) -> Profile | None:
    """The row of a platform."""
    kind = Profile.kind == PLATFORM_KIND
    return session.scalar(select(Profile).where(Profile.fleet_id == fleet_id, Profile.name == name, kind))


def running(session: Session, fleet_id: str, digests: Sequence[str]) -> dict[str, int]:
    """How many devices say that they run each of these bundles; those that none runs are left out."""
    says = Device.facts["agent"]["release"].as_string()
    here = (Device.fleet_id == fleet_id, Device.forgotten_at.is_(None), says.in_(digests))
    # Grouped by its name: PostgreSQL takes the same path with other parameters for another expression.
    query = select(says.label("says"), func.count()).where(*here).group_by("says")
    return {row[0]: row[1] for row in session.execute(query)}


def _releases(fleet_id: str) -> Select[Version]:
    query = select(Version).join(Model, Model.id == Version.model_id)
    return query.where(Version.fleet_id == fleet_id, Model.kind == AGENT_KIND)
