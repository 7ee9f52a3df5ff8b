"""What follows from a device's facts and tags: what it can be asked for by, and its profile."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy.orm import Session

from fleet_server.devices import repository
from fleet_server.devices.attributes import attributes_of
from fleet_server.devices.matching import NamedProfile, best_profile
from fleet_server.devices.schemas import ProfileSpec
from fleet_server.models import Device


def keep_attributes(session: Session, devices: Sequence[Device], new: Collection[str] = ()) -> None:
    """Let devices be found by what they are now.

    Args:
        session: to write with.
        devices: in the database already.
        new: ids of those of which nothing is known yet.
    """
    known = repository.attributes(session, {one.id for one in devices} - set(new))
    added, removed = [], []
    for device in sorted(devices, key=lambda one: one.id):
        wanted, before = attributes_of(device.facts, device.tags, device.serving), known.get(device.id, set())
        added += [(device, one) for one in sorted(wanted - before)]
        removed += [(device.id, one) for one in before - wanted]
    repository.remove_attributes(session, removed)
    repository.add_attributes(session, added)


def named_profiles(session: Session, fleet_id: str) -> list[NamedProfile]:
    """Every profile of a fleet, to match devices with."""
    return [
        NamedProfile(profile.id, profile.name, ProfileSpec.model_validate(profile.spec))
        for profile in repository.profiles(session, fleet_id)
    ]


def rematch(device: Device, profiles: list[NamedProfile]) -> None:
    """Give a device the profile that fits it best, where nobody pinned one to it."""
    if not device.profile_pinned:
        best = best_profile(device.facts, device.tags, profiles)
        device.profile_id = best.id if best else None
