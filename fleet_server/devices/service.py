"""Rules of devices and profiles. Each function works in its caller's transaction."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.orm import Session

from agent.protocol.manifest import RuntimeName
from fleet_server import audit
from fleet_server.clock import utc_now
from fleet_server.devices import repository
from fleet_server.devices.attributes import COLUMNS, NAMES, TAG
from fleet_server.devices.delivery import Delivery, policy_of
from fleet_server.devices.derived import keep_attributes, named_profiles, rematch
from fleet_server.devices.matching import effective_tags
from fleet_server.devices.schemas import (
    DeploymentWaiting,
    DeviceUpdate,
    DeviceView,
    HoldView,
    ProblemView,
    ProfileCreate,
    ProfileSpec,
    ProfileView,
    ServingView,
)
from fleet_server.devices.selection import condition, read_query, tags_in
from fleet_server.errors import ConflictError, InvalidError, NotFoundError
from fleet_server.models import Device, Profile
from fleet_server.principals import Who


def get_device(session: Session, fleet_id: str, device_id: str) -> Device:
    """One device.

    Raises:
        NotFoundError: when the fleet has none of that id.
    """
    device = repository.device(session, fleet_id, device_id)
    if device is None:
        raise NotFoundError("device", device_id, remedy="an agent registers itself when it first connects")
    return device


def select_devices(
    session: Session,
    fleet_id: str,
    *,
    all_of_them: bool,
    devices: Sequence[str],
    profiles: Sequence[str],
    tags: dict[str, str],
    query: str | None = None,
) -> list[Device]:
    """The devices that meet everything that is given, by id.

    Raises:
        NotFoundError: naming the devices or the profile that do not exist.
        InvalidError: for a query that can't be read, or that names a tag that no device has.
    """
    wanted_profiles = {get_profile(session, fleet_id, name).id for name in profiles}
    found = repository.all_devices(session, fleet_id, None if not devices else sorted(set(devices)))
    unknown = sorted(set(devices) - {device.id for device in found})
    if unknown:
        raise NotFoundError("device", ", ".join(unknown[:10]), remedy="list them with `shoal device list`")
    if not (all_of_them or devices or profiles or tags or query):
        return []
    queried = _queried(session, fleet_id, query) if query else None
    return [
        device
        for device in found
        if (not profiles or device.profile_id in wanted_profiles)
        and (queried is None or device.id in queried)
        and tags.items() <= effective_tags(device.facts, device.tags).items()
    ]


def chosen_devices(
    session: Session, fleet_id: str, named: Sequence[str], query: str | None, *, most: int
) -> Sequence[Device]:
    """Devices that are named, and those that a query holds for.

    Args:
        session: to read with.
        fleet_id: of the devices.
        named: their ids.
        query: in RSQL; None for no more than those.
        most: how many there may be.

    Raises:
        NotFoundError: when one that is named is not there.
        InvalidError: naming the field, when the query can't be read, or none or too many are meant.
    """
    found = [get_device(session, fleet_id, one) for one in dict.fromkeys(named)]
    if query is not None:
        holds = query_condition(session, fleet_id, query, field="query")
        known = {one.id for one in found}
        found += [one for one in repository.matching(session, fleet_id, holds, most + 1) if one.id not in known]
    if not found:
        raise InvalidError(
            "no_device", "devices or query: no device is meant; see `shoal device list`", field="devices"
        )
    if len(found) > most:
        raise InvalidError("too_many_devices", f"query: more than {most} devices: ask fewer", field="query")
    return found


def query_condition(session: Session, fleet_id: str, query: str, *, field: str) -> ColumnElement[bool]:
    """A query as a condition over `devices`.

    Raises:
        InvalidError: naming the field, where it can't be read, or names a tag that no device of the fleet has.
    """
    node = read_query(query, field)
    tags = tags_in(node)
    unknown = tags - {name.removeprefix(TAG) for name in repository.attribute_names(session, fleet_id, map(_tag, tags))}
    if unknown:
        name = min(unknown)
        raise InvalidError(
            "bad_query",
            f"{field}: {name!r} is no attribute, and no device has a tag of that name; attributes are "
            f"{', '.join([*COLUMNS, *NAMES])}; write tag.{name} if you mean a tag that devices will have",
            field=field,
        )
    return condition(node, fleet_id)


def _tag(name: str) -> str:
    return TAG + name


def _queried(session: Session, fleet_id: str, query: str) -> set[str]:
    found = query_condition(session, fleet_id, query, field="target.query")
    return {device.id for device in repository.devices_where(session, fleet_id, found)}


def update_device(session: Session, fleet_id: str, device_id: str, change: DeviceUpdate, *, actor: Who) -> Device:
    """Change a device's tags or pin its profile.

    Raises:
        NotFoundError: for an unknown device or profile.
    """
    device = get_device(session, fleet_id, device_id)
    before = {"tags": dict(device.tags), "profile": profile_name(session, device), "pinned": device.profile_pinned}
    if change.tags is not None:
        device.tags = dict(change.tags)
        keep_attributes(session, [device])
    if "profile" in change.model_fields_set:
        device.profile_pinned = change.profile is not None
        if change.profile is not None:
            device.profile_id = get_profile(session, fleet_id, change.profile).id
    rematch(device, named_profiles(session, fleet_id))
    audit.record(
        session,
        fleet_id=fleet_id,
        actor=actor,
        action="device.update",
        subject=f"device/{device_id}",
        detail=change.model_dump(exclude_unset=True),
        before=before,
        after={"tags": dict(device.tags), "profile": profile_name(session, device), "pinned": device.profile_pinned},
    )
    return device


def hold_device(session: Session, fleet_id: str, device_id: str, reason: str, *, actor: Who) -> Device:
    """Let no rollout send a device anything until it is released; what it runs goes on.

    Raises:
        NotFoundError: when the fleet has none of that id.
    """
    device = get_device(session, fleet_id, device_id)
    before, held = device.hold, HoldView(by=str(actor), at=utc_now(), reason=reason)
    device.hold = held.model_dump(mode="json")
    _record_hold(session, device, "device.hold", before, actor)
    return device


def release_device(session: Session, fleet_id: str, device_id: str, *, actor: Who) -> Device:
    """Let rollouts send a device something again.

    Raises:
        NotFoundError: when the fleet has none of that id.
    """
    device = get_device(session, fleet_id, device_id)
    before, device.hold = device.hold, None
    _record_hold(session, device, "device.release", before, actor)
    return device


def _record_hold(session: Session, device: Device, action: str, before: dict[str, Any] | None, actor: Who) -> None:
    audit.record(
        session,
        fleet_id=device.fleet_id,
        actor=actor,
        action=action,
        subject=f"device/{device.id}",
        before={"hold": before},
        after={"hold": device.hold},
    )


def forget_device(session: Session, fleet_id: str, device_id: str, *, actor: Who) -> None:
    """Hide a device that is offline. Its history stays; when it connects again it is back, with its tags.

    Raises:
        NotFoundError: when the fleet has none of that id.
        ConflictError: when it is online: it would be back at once.
    """
    device = get_device(session, fleet_id, device_id)
    if device.online:
        raise ConflictError("device_online", f"device {device_id!r} is online: stop its agent first")
    device.forgotten_at, device.serving = utc_now(), []
    keep_attributes(session, [device])
    audit.record(session, fleet_id=fleet_id, actor=actor, action="device.forget", subject=f"device/{device_id}")


def get_profile(session: Session, fleet_id: str, name: str) -> Profile:
    """One profile by name.

    Raises:
        NotFoundError: saying which there are.
    """
    profile = repository.profile(session, fleet_id, name)
    if profile is None:
        names = ", ".join(one.name for one in repository.profiles(session, fleet_id)[:20])
        raise NotFoundError("profile", name, remedy=f"there are: {names}" if names else "create it first")
    return profile


def _check_runtime(session: Session, fleet_id: str, name: str) -> None:
    """Refuse a runtime that comes with no agent and that no device of the fleet reports: nothing would match."""
    if name in set(RuntimeName):
        return
    known = sorted({*RuntimeName, *repository.attribute_texts(session, fleet_id, "runtime")})
    if name in known:
        return
    near = get_close_matches(name, known, n=1)
    meant = f", did you mean '{near[0]}'?" if near else ""
    detail = (
        f"runtime: no agent comes with {name!r} and no device of the fleet reports it{meant} (known: "
        f"{', '.join(known)}); where a package brings it to devices that are yet to come, set allow_unknown_runtime"
    )
    raise InvalidError("unknown_runtime", detail, field="runtime")


def create_profile(session: Session, fleet_id: str, wanted: ProfileCreate, *, actor: Who) -> Profile:
    """Add a profile, and let every device that is not pinned match again.

    Raises:
        ConflictError: when the name is taken by another specification.
        InvalidError: when nobody knows its runtime, and that is not allowed.
    """
    spec = wanted.model_dump(mode="json", exclude={"name", "delivery", "allow_unknown_runtime"})
    delivery = wanted.delivery.model_dump(mode="json") if wanted.delivery else None
    existing = repository.profile(session, fleet_id, wanted.name)
    if existing is not None:
        # What is stored may come from before a field was there: it then has the field's default.
        same = ProfileSpec.model_validate(existing.spec).model_dump(mode="json") == spec
        if same and policy_of(existing.delivery) == policy_of(delivery):
            return existing
        raise ConflictError("profile_exists", f"profile {wanted.name!r} is there already, with another specification")
    if not wanted.allow_unknown_runtime:
        _check_runtime(session, fleet_id, wanted.runtime)
    profile = Profile(fleet_id=fleet_id, name=wanted.name, spec=spec, delivery=delivery)
    session.add(profile)
    session.flush()
    _rematch_all(session, fleet_id)
    audit.record(
        session, fleet_id=fleet_id, actor=actor, action="profile.create", subject=f"profile/{wanted.name}", after=spec
    )
    return profile


def change_delivery(
    session: Session, fleet_id: str, name: str, delivery: Delivery | None, *, actor: Who
) -> tuple[Profile, Sequence[Device]]:
    """Change how artifacts may come to a profile's devices; returns those, which are to be told.

    Raises:
        NotFoundError: when there is no such profile.
    """
    profile = get_profile(session, fleet_id, name)
    before, after = profile.delivery, delivery.model_dump(mode="json") if delivery else None
    profile.delivery = after
    session.flush()
    audit.record(
        session,
        fleet_id=fleet_id,
        actor=actor,
        action="profile.update",
        subject=f"profile/{name}",
        before={"delivery": before},
        after={"delivery": after},
    )
    return profile, repository.with_profile(session, fleet_id, profile.id)


def delete_profile(session: Session, fleet_id: str, name: str, *, actor: Who) -> None:
    """Remove a profile no variant was built for; its devices match again.

    Raises:
        ConflictError: when a variant was built for it.
    """
    profile = get_profile(session, fleet_id, name)
    variants = repository.variants_of_profile(session, profile.id)
    if variants:
        raise ConflictError("profile_in_use", f"profile {name!r} has {variants} variants, which keep their history")
    spec = profile.spec
    repository.unpin(session, profile.id)
    session.flush()
    session.delete(profile)
    session.flush()
    _rematch_all(session, fleet_id)
    audit.record(
        session, fleet_id=fleet_id, actor=actor, action="profile.delete", subject=f"profile/{name}", before=spec
    )


def profile_view(profile: Profile, devices: int | None = None) -> ProfileView:
    """The HTTP shape of a profile."""
    return ProfileView(
        id=profile.id,
        name=profile.name,
        spec=ProfileSpec.model_validate(profile.spec),
        delivery=Delivery.model_validate(profile.delivery) if profile.delivery else None,
        devices=devices,
        created_at=profile.created_at,
    )


def device_view(device: Device, profile_name: str | None) -> DeviceView:
    """The HTTP shape of a device."""
    return DeviceView(
        id=device.id,
        profile=profile_name,
        profile_pinned=device.profile_pinned,
        online=device.online,
        last_seen_at=device.last_seen_at,
        tags=effective_tags(device.facts, device.tags),
        facts=device.facts,
        serving=[ServingView.model_validate(one) for one in device.serving],
        problems=[problem_view(one) for one in device.problems],
        waiting=waiting_views(device.reported_deployments),
        hold=HoldView.model_validate(device.hold) if device.hold else None,
        desired_revision=device.desired_revision,
        reported_revision=device.reported_revision,
        created_at=device.created_at,
    )


def waiting_views(deployments: Iterable[dict[str, Any]]) -> list[DeploymentWaiting]:
    """Those of a device's reported deployments that stand still on purpose."""
    return [DeploymentWaiting.model_validate(one) for one in deployments if one.get("waiting")]


def problem_view(one: dict[str, Any]) -> ProblemView:
    """The HTTP shape of a problem that a device reported."""
    first, last = (dt.datetime.fromtimestamp(one[name], dt.UTC) for name in ("first_at", "last_at"))
    return ProblemView(
        code=one["code"], detail=one["detail"], first_at=first, last_at=last, count=one["count"], ongoing=one["ongoing"]
    )


def profile_name(session: Session, device: Device) -> str | None:
    """The name of a device's profile."""
    found = session.get(Profile, device.profile_id) if device.profile_id else None
    return found.name if found else None


def _rematch_all(session: Session, fleet_id: str) -> None:
    profiles = named_profiles(session, fleet_id)
    for device in repository.all_devices(session, fleet_id):
        rematch(device, profiles)
