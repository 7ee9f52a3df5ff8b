"""Which devices a rollout would reach, with what, and what is in the way: reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from agent.protocol.release import AGENT
from fleet_server.agent_releases import repository as release_rows
from fleet_server.agent_releases import service as releases
from fleet_server.catalog.service import is_proven, ready_variant
from fleet_server.devices import service as device_service
from fleet_server.devices.matching import effective_tags
from fleet_server.domain.stages import Member
from fleet_server.domain.strategy import RolloutTarget
from fleet_server.errors import ConflictError, InvalidError
from fleet_server.models import Deployment, Device, Profile, Variant, Version
from fleet_server.rollouts import repository

_NAMED = 20


@dataclass
class Survey:
    """What a target comes to.

    Attributes:
        devices: that have a variant.
        variants: by profile id.
        names: of profiles, by id.
        strangers: devices that no profile matches.
        missing: devices by the name of their profile, which has no variant that passed the gate.
        unproven: names of profiles whose variant no device has measured.
        busy: what other open rollouts of the model have not settled on these devices.
        places: the profile of each device, or its platform where a release of the agent is rolled out, by device id.
        left_out: devices that can't become another release by themselves, by the reason.
    """

    devices: list[Device] = field(default_factory=list)
    variants: dict[str, Variant] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)
    unproven: list[str] = field(default_factory=list)
    busy: Sequence[Deployment] = ()
    places: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @property
    def artifacts(self) -> dict[str, str | None]:
        """Digests by profile name."""
        return {self.names[profile_id]: variant.digest for profile_id, variant in self.variants.items()}

    def profile_of(self, device: Device) -> str:
        """The name of a device's profile, or of its platform."""
        return self.names[self.places[device.id]]

    def variant_of(self, device: Device) -> Variant:
        """What a device would run."""
        return self.variants[self.places[device.id]]

    def members(self) -> list[Member]:
        """The devices as their places in the stages are found."""
        return [
            Member(device.id, self.profile_of(device), effective_tags(device.facts, device.tags))
            for device in self.devices
        ]


def select(session: Session, fleet_id: str, target: RolloutTarget) -> list[Device]:
    """The devices of a target.

    Raises:
        NotFoundError: for an unknown device or profile.
        InvalidError: for a query that can't be read.
    """
    return device_service.select_devices(
        session,
        fleet_id,
        all_of_them=target.all,
        devices=target.devices,
        profiles=target.profiles,
        tags=target.tags,
        query=target.query,
    )


def survey(session: Session, version: Version, target: RolloutTarget) -> Survey:
    """What a target comes to for a version.

    Raises:
        NotFoundError: for an unknown device or profile.
        InvalidError: for a query that can't be read, or a target that selects no device.
    """
    selected = select(session, version.fleet_id, target)
    if not selected:
        raise InvalidError(
            "no_device", "target: it selects no device; see which there are with `shoal device list`", field="target"
        )
    if releases.is_release(session, version):
        return _survey_release(session, version, selected)
    found = Survey()
    for profile_id in sorted({str(device.profile_id) for device in selected if device.profile_id is not None}):
        found.names[profile_id] = session.get_one(Profile, profile_id).name
        variant = ready_variant(session, version.id, profile_id)
        if variant is not None:
            found.variants[profile_id] = variant
            if not is_proven(variant):
                found.unproven.append(found.names[profile_id])
    for device in selected:
        if device.profile_id is None:
            found.strangers.append(device.id)
        elif device.profile_id in found.variants:
            found.devices.append(device)
            found.places[device.id] = device.profile_id
        else:
            found.missing.setdefault(found.names[device.profile_id], []).append(device.id)
    found.busy = repository.unsettled(session, version.model_id, [device.id for device in found.devices])
    return found


def _survey_release(session: Session, version: Version, selected: Sequence[Device]) -> Survey:
    """Devices that others update are left out, and say why; a platform without a bundle is in the way."""
    found, bundles = Survey(), release_rows.bundles(session, version.id)
    found.names = {platform.id: platform.name for _, platform in bundles}
    for device in selected:
        if why := releases.unable(device):
            found.left_out.setdefault(why, []).append(device.id)
        elif (variant := releases.bundle_for(bundles, device)) is None:
            found.missing.setdefault(str(device.facts["agent"]["platform"]), []).append(device.id)
        else:
            found.devices.append(device)
            found.places[device.id] = variant.profile_id
            found.variants[variant.profile_id] = variant
    found.busy = repository.unsettled(session, version.model_id, [device.id for device in found.devices])
    return found


def variant_for(session: Session, version: Version, device: Device, *, allow_unproven: bool) -> Variant | None:
    """What a device that comes later would run; None where there is nothing for it, or nothing proven."""
    if releases.is_release(session, version):
        bundles = release_rows.bundles(session, version.id)
        return None if releases.unable(device) else releases.bundle_for(bundles, device)
    variant = ready_variant(session, version.id, device.profile_id) if device.profile_id else None
    return variant if variant is not None and (allow_unproven or is_proven(variant)) else None


def refuse_gaps(found: Survey, reference: str, *, allow_unproven: bool) -> None:
    """Refuse where devices would get nothing, or what no device has measured.

    Raises:
        ConflictError: saying for whom, and what to do.
    """
    if found.left_out and not found.devices and not found.missing:
        reasons = "; ".join(f"{named(devices)}: {why}" for why, devices in sorted(found.left_out.items()))
        raise ConflictError("no_self_update", f"none of these devices updates its agent by itself ({reasons})")
    if found.missing and reference.startswith(f"{AGENT}@"):
        raise ConflictError(
            "no_bundle_for_platform",
            f"{reference} has no bundle for {named(sorted(found.missing))}: push one with `shoal agent-release push`, "
            "or leave those devices out",
        )
    if found.strangers:
        raise ConflictError(
            "device_without_profile",
            f"no profile matches {named(found.strangers)}: create one, pin the devices, or leave them out",
        )
    if found.missing:
        raise ConflictError(
            "no_variant_for_profile",
            f"{reference} has no variant that passed the gate for {named(sorted(found.missing))}: "
            f"see `shoal variant list --version {reference}`, and build it with `shoal variant build`",
        )
    if found.unproven and not allow_unproven:
        raise ConflictError(
            "variant_unproven",
            f"{reference} was measured on the server only for {named(sorted(found.unproven))}: measure it on a device "
            f"with `shoal gate run {reference} --profile {min(found.unproven)}`, or allow it (--allow-unproven)",
        )


def refuse_busy(busy: Sequence[Deployment]) -> None:
    """Refuse devices that other rollouts have not settled.

    Raises:
        ConflictError: naming them.
    """
    if busy:
        ids = sorted({deployment.device_id for deployment in busy})
        rollouts = sorted({deployment.rollout_id for deployment in busy})
        raise ConflictError(
            "device_busy",
            f"{named(ids)} still in rollout {named(rollouts)}: wait, abort it, or supersede it (on_busy=supersede)",
        )


def named(names: Iterable[str]) -> str:
    """Names as a sentence has them: the first few, and how many more."""
    shown = list(names)
    rest = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return ", ".join(shown[:_NAMED]) + rest
