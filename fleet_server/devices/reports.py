"""What devices say of themselves, and whether they are connected. Each function works in its caller's transaction.

Both come of many devices at once, and are taken in so: what is read is read once for all of them, and what is written
is written together.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.messages import Presence, Reported
from agent.protocol.topics import check_device_id
from fleet_server import audit
from fleet_server.devices import repository
from fleet_server.devices.derived import keep_attributes, named_profiles, rematch
from fleet_server.models import Device
from fleet_server.principals import DEFAULT_FLEET

BOOTS = 16  # that a device is known to have had before the present one


@dataclass(frozen=True)
class ReportOutcome:
    """What became of a report.

    Attributes:
        device: whose it is.
        accepted: false for one older than what is known.
        lans: where it, or its address, is new or gone: their other devices are to be told.
    """

    device: Device
    accepted: bool
    lans: frozenset[str] = frozenset()


def record_reports(session: Session, said: Mapping[str, Reported], now: dt.datetime) -> dict[str, ReportOutcome]:
    """Store what devices say is true on them, by their ids; unknown devices are registered.

    A report of the same boot with a sequence no higher than the last, or of an earlier boot, is stale and changes
    nothing.

    Raises:
        IntegrityError: when another server registers one of them at the same time: to be tried again.
    """
    for device_id in said:
        check_device_id(device_id)
    known = repository.by_id(session, said)
    devices = known | _registered(session, said.keys() - known)
    outcomes, moved = {}, []
    findable: list[Device] = []
    for device_id, reported in sorted(said.items()):
        device, new = devices[device_id], device_id not in known
        if not new and _is_stale(device, reported):
            outcomes[device_id] = ReportOutcome(device, accepted=False)
            continue
        facts, serving = _as_kept(reported.facts), _as_kept(reported.serving)
        outcomes[device_id] = ReportOutcome(device, accepted=True, lans=_lans_changed(device.facts, facts))
        if facts != device.facts:
            moved.append(device)
        if new or facts != device.facts or serving != device.serving:
            findable.append(device)
        device.facts, device.serving = facts, serving
        _note(session, device, reported, now)
    _match(session, moved)
    session.add_all(devices[device_id] for device_id in sorted(devices.keys() - known.keys()))
    session.flush()  # before there is anything that belongs to those that are new
    keep_attributes(session, findable, new=devices.keys() - known)
    held = {device_id: set(said[device_id].held) for device_id, one in outcomes.items() if one.accepted}
    repository.keep_holdings(session, [devices[device_id] for device_id in held], held)
    return outcomes


def _registered(session: Session, ids: set[str]) -> dict[str, Device]:
    """New devices, of the fleets that they enrolled into, and with the tags that they then got."""
    if not ids:
        return {}
    identities = repository.identities(session, ids)
    found = {}
    for device_id in sorted(ids):
        identity = identities.get(device_id)
        fleet_id, tags = (identity.fleet_id, dict(identity.tags)) if identity else (DEFAULT_FLEET, {})
        found[device_id] = Device(
            id=device_id, fleet_id=fleet_id, facts={}, serving=[], tags=tags, online=True, reported_sequence=0
        )
        audit.record(
            session, fleet_id=fleet_id, actor=device_id, action="device.register", subject=f"device/{device_id}"
        )
    return found


def _note(session: Session, device: Device, reported: Reported, now: dt.datetime) -> None:
    """Keep of a report that is not stale what needs nothing else."""
    if device.forgotten_at is not None:
        device.forgotten_at = None
        audit.record(
            session, fleet_id=device.fleet_id, actor=device.id, action="device.return", subject=f"device/{device.id}"
        )
    if device.boot_id is not None and device.boot_id != reported.boot_id:
        device.earlier_boots = [*(device.earlier_boots or []), device.boot_id][-BOOTS:]
    device.boot_id, device.reported_sequence = reported.boot_id, reported.sequence
    device.reported_revision, device.last_seen_at, device.online = reported.revision, now, True
    device.reported_deployments = _as_kept(reported.deployments)
    device.problems = _as_kept(reported.problems)


def _match(session: Session, moved: Sequence[Device]) -> None:
    """Match devices whose facts changed. Others have the profile they had: whoever changes tags or profiles does it."""
    profiles = {fleet_id: named_profiles(session, fleet_id) for fleet_id in {one.fleet_id for one in moved}}
    for device in moved:
        rematch(device, profiles[device.fleet_id])


def _lans_changed(before: dict[str, Any], now: dict[str, Any]) -> frozenset[str]:
    """LANs whose devices have another list now."""
    was, is_now = ((one.get("balancing_lan") or "", one.get("balancing_address") or "") for one in (before, now))
    return frozenset() if was == is_now else frozenset(lan for lan, _ in (was, is_now) if lan)


def _is_stale(device: Device, reported: Reported) -> bool:
    """Whether something later is known. Of several servers one may hear late what was said before another boot."""
    if device.boot_id == reported.boot_id:
        return reported.sequence <= device.reported_sequence
    return reported.boot_id in (device.earlier_boots or [])


def _as_kept(said: object) -> Any:
    """What a device says as a JSON column gives it back, so that what did not change is seen to be the same."""
    return msgspec.json.decode(msgspec.json.encode(said))


def record_presence(session: Session, said: Sequence[tuple[str, Presence]], now: dt.datetime) -> set[str]:
    """Store whether devices are connected, as they said in this order.

    The offline message of an earlier boot, which a broker may deliver late, changes nothing.

    Returns:
        Those of them that are known; the report of another will register it.
    """
    known = repository.by_id(session, {device_id for device_id, _ in said})
    for device_id, presence in said:
        device = known.get(device_id)
        if device is not None and (presence.online or device.boot_id in {None, presence.boot_id}):
            device.online, device.last_seen_at = presence.online, now
    return set(known)
