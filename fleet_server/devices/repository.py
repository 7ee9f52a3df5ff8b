"""Every query over devices and profiles."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from sqlalchemy import ColumnElement, Select, delete, func, insert, literal, select, update
from sqlalchemy.orm import Session

from fleet_server.db import UtcDateTime, pieces, rows_by, rows_in, scalars_by
from fleet_server.devices.attributes import Attribute
from fleet_server.models import Device, DeviceAttribute, DeviceHolding, DeviceIdentity, Profile, Variant
from fleet_server.paging import PageRequest, Rows, TableList

LONG_AGO = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
DEVICES = TableList(
    Device.id,
    {
        "id": Device.id,
        "created_at": Device.created_at,
        "last_seen_at": func.coalesce(Device.last_seen_at, literal(LONG_AGO, UtcDateTime())),
        "profile": func.coalesce(Profile.name, ""),
    },
    default="id",
    time=Device.created_at,
)
PROFILES = TableList(
    Profile.id,
    {"name": Profile.name, "created_at": Profile.id},
    default="name",
    name=Profile.name,
    time=Profile.created_at,
)


def device(session: Session, fleet_id: str, device_id: str) -> Device | None:
    """One device of a fleet that was not forgotten."""
    found = session.get(Device, device_id)
    if found is None or found.fleet_id != fleet_id or found.forgotten_at is not None:
        return None
    return found


def by_id(session: Session, ids: Collection[str]) -> dict[str, Device]:
    """Devices of whatever fleet, forgotten ones too, that are there; in the order of their ids."""
    query = select(Device).order_by(Device.id)
    return {one.id: one for one in scalars_by(session, query, Device.id, sorted(ids))}


def devices_page(
    session: Session,
    fleet_id: str,
    request: PageRequest,
    *,
    profile: str | None,
    online: bool | None,
    condition: ColumnElement[bool] | None = None,
) -> Rows[tuple[Device, str | None]]:
    """A page of devices, with the names of their profiles."""
    query = (
        select(Device, Profile.name)
        .outerjoin(Profile, Profile.id == Device.profile_id)
        .where(Device.fleet_id == fleet_id, Device.forgotten_at.is_(None))
    )
    if profile is not None:
        query = query.where(Profile.name == profile)
    if online is not None:
        query = query.where(Device.online.is_(online))
    if condition is not None:
        query = query.where(condition)
    return DEVICES.rows(session, query, request)


def with_profile(session: Session, fleet_id: str, profile_id: str) -> Sequence[Device]:
    """Every device of a fleet that has a profile and was not forgotten, by id."""
    query = select(Device).where(*_of_profile(fleet_id, profile_id)).order_by(Device.id)
    return session.scalars(query).all()


def _of_profile(fleet_id: str, profile_id: str) -> tuple[ColumnElement[bool], ...]:
    return Device.fleet_id == fleet_id, Device.profile_id == profile_id, Device.forgotten_at.is_(None)


def all_devices(session: Session, fleet_id: str, ids: Sequence[str] | None = None) -> Sequence[Device]:
    """Every device of a fleet, or those of the given ids, by id."""
    query = select(Device).where(Device.fleet_id == fleet_id, Device.forgotten_at.is_(None)).order_by(Device.id)
    if ids is None:
        return session.scalars(query).all()
    return list(scalars_by(session, query, Device.id, ids))


def devices_where(session: Session, fleet_id: str, condition: ColumnElement[bool]) -> Sequence[Device]:
    """The devices of a fleet that a condition holds for, by id."""
    query = select(Device).where(Device.fleet_id == fleet_id, Device.forgotten_at.is_(None), condition)
    return session.scalars(query.order_by(Device.id)).all()


def attributes(session: Session, device_ids: Collection[str]) -> dict[str, set[Attribute]]:
    """What devices can be asked for by; one that has nothing is left out."""
    found: dict[str, set[Attribute]] = defaultdict(set)
    query = select(DeviceAttribute.device_id, DeviceAttribute.name, DeviceAttribute.text, DeviceAttribute.number)
    for device_id, name, text, number in rows_by(session, query, DeviceAttribute.device_id, sorted(device_ids)):
        found[device_id].add(Attribute(name, text, number))
    return found


def add_attributes(session: Session, added: Iterable[tuple[Device, Attribute]]) -> None:
    """Let devices, which are in the database already, be found by more."""
    rows = [{"device_id": device.id, "fleet_id": device.fleet_id, **one._asdict()} for device, one in added]
    if rows:
        # Else those with a number and those without are statements of their own, by turns.
        session.execute(insert(DeviceAttribute).execution_options(render_nulls=True), rows)


def remove_attributes(session: Session, removed: Collection[tuple[str, Attribute]]) -> None:
    """Let devices, by their ids, be found by less."""
    key = (DeviceAttribute.device_id, DeviceAttribute.name, DeviceAttribute.text)
    for piece in pieces(sorted((device_id, one.name, one.text) for device_id, one in removed)):
        session.execute(delete(DeviceAttribute).where(rows_in(key, piece)))


def identities(session: Session, ids: Collection[str]) -> dict[str, DeviceIdentity]:
    """Those of devices that have enrolled."""
    found = scalars_by(session, select(DeviceIdentity), DeviceIdentity.device_id, sorted(ids))
    return {one.device_id: one for one in found}


def on_lan(session: Session, fleet_id: str, lan: str, limit: int) -> Sequence[Device]:
    """Devices of a fleet that say they are on a LAN, by id."""
    member = (DeviceAttribute.fleet_id == fleet_id, DeviceAttribute.name == "lan", DeviceAttribute.text == lan)
    query = select(Device).join(DeviceAttribute, DeviceAttribute.device_id == Device.id)
    query = query.where(*member, Device.forgotten_at.is_(None))
    return session.scalars(query.order_by(Device.id).limit(limit)).all()


def attribute_names(session: Session, fleet_id: str, names: Iterable[str]) -> set[str]:
    """Those of some names that a device of the fleet has a value of."""
    query = select(DeviceAttribute.name).where(DeviceAttribute.fleet_id == fleet_id).limit(1)  # not all that have it
    found = (session.scalar(query.where(DeviceAttribute.name == name)) for name in sorted(set(names)))
    return {name for name in found if name is not None}


def attribute_texts(session: Session, fleet_id: str, name: str) -> set[str]:
    """The values that devices of the fleet have of an attribute."""
    rows = (DeviceAttribute.fleet_id == fleet_id, DeviceAttribute.name == name)
    return set(session.scalars(select(DeviceAttribute.text).where(*rows).distinct()))


def profile(session: Session, fleet_id: str, name: str) -> Profile | None:
    """One profile by name."""
    return session.scalar(_profiles(fleet_id).where(Profile.name == name))


def profiles(session: Session, fleet_id: str) -> Sequence[Profile]:
    """Every profile, by name."""
    return session.scalars(_profiles(fleet_id).order_by(Profile.name)).all()


def profiles_page(session: Session, fleet_id: str, request: PageRequest) -> Rows[Profile]:
    """A page of profiles."""
    return PROFILES.scalars(session, _profiles(fleet_id), request)


def _profiles(fleet_id: str) -> Select[Profile]:
    """People's profiles: platforms of the agent's releases are none of them."""
    return select(Profile).where(Profile.fleet_id == fleet_id, Profile.kind == "model")


def devices_of_profile(session: Session, fleet_id: str, profile_id: str) -> int:
    """How many devices of a fleet have a profile."""
    query = select(func.count()).select_from(Device)
    return session.scalar(query.where(*_of_profile(fleet_id, profile_id))) or 0


def variants_of_profile(session: Session, profile_id: str) -> int:
    """How many variants were built for a profile."""
    return session.scalar(select(func.count()).select_from(Variant).where(Variant.profile_id == profile_id)) or 0


def unpin(session: Session, profile_id: str) -> None:
    """Let no device have a profile, forgotten ones neither."""
    session.execute(update(Device).where(Device.profile_id == profile_id).values(profile_id=None, profile_pinned=False))


def keep_holdings(session: Session, devices: Sequence[Device], held: Mapping[str, Collection[str]]) -> None:
    """Note which artifacts devices, which are in the database already, say they have: digests by device."""
    query = select(DeviceHolding.device_id, DeviceHolding.digest)
    known = {(row[0], row[1]) for row in rows_by(session, query, DeviceHolding.device_id, sorted(held))}
    now = {(device_id, digest) for device_id, digests in held.items() for digest in digests}
    for gone in pieces(sorted(known - now)):
        key = (DeviceHolding.device_id, DeviceHolding.digest)
        session.execute(delete(DeviceHolding).where(rows_in(key, gone)))
    fleets = {device.id: device.fleet_id for device in devices}
    rows = [
        {"device_id": device_id, "digest": digest, "fleet_id": fleets[device_id]}
        for device_id, digest in sorted(now - known)
    ]
    if rows:
        session.execute(insert(DeviceHolding), rows)


def matching(session: Session, fleet_id: str, condition: ColumnElement[bool], limit: int) -> Sequence[Device]:
    """Devices that a condition holds for."""
    query = select(Device).where(Device.fleet_id == fleet_id, Device.forgotten_at.is_(None), condition)
    return session.scalars(query.order_by(Device.id).limit(limit)).all()
