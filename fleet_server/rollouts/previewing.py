"""A dry run: what a rollout would do and what is in its way. It reads what creating reads, and changes nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from sqlalchemy.orm import Session

from fleet_server.agent_releases.service import resolve
from fleet_server.catalog.service import is_proven
from fleet_server.domain.stages import assign_stages
from fleet_server.domain.strategy import RolloutStrategy
from fleet_server.models import Device, Fleet, Model, Version
from fleet_server.rollouts.planning import Survey, named, survey
from fleet_server.rollouts.schemas import (
    PreviewLink,
    PreviewProblem,
    PreviewProfile,
    PreviewStage,
    RolloutCreate,
    RolloutPreview,
)

SHOWN = 500
FIRST = 20


def preview(session: Session, fleet_id: str, wanted: RolloutCreate) -> RolloutPreview:
    """What a rollout would do.

    Raises:
        NotFoundError: for an unknown version, device or profile.
        InvalidError: when the target selects no device.
    """
    wanted = wanted.fitting()
    version = resolve(session, fleet_id, wanted.version)
    found = survey(session, version, wanted.target)
    stages = _stages(found, wanted.strategy, wanted.name or wanted.version)
    problems = _problems(found, wanted)
    return RolloutPreview(
        model=session.get_one(Model, version.model_id).name,
        version=version.name,
        devices=len(found.devices),
        profiles=_profiles(found, version),
        stages=stages,
        links=_links(found),
        broadcast_bytes=_broadcast(found, stages),
        at_least_s=sum(one.at_least_s for one in stages),
        approvals_needed=session.get_one(Fleet, fleet_id).approvals,
        problems=problems,
        starts=not any(one.blocks for one in problems),
    )


def _profiles(found: Survey, version: Version) -> list[PreviewProfile]:
    counts = Counter(found.profile_of(device) for device in found.devices)
    return [
        PreviewProfile(
            profile=found.names[profile_id],
            devices=counts[found.names[profile_id]],
            version=version.name,
            digest=variant.digest,
            artifact_bytes=variant.size or 0,
            proven=is_proven(variant),
        )
        for profile_id, variant in found.variants.items()
    ]


def _stages(found: Survey, strategy: RolloutStrategy, seed: str) -> list[PreviewStage]:
    devices = {device.id: device for device in found.devices}
    by_stage: dict[int, list[Device]] = defaultdict(list)
    for device_id, stage in assign_stages(found.members(), strategy, seed).items():
        by_stage[stage].append(devices[device_id])
    return [
        PreviewStage(
            stage=index,
            devices=len(by_stage[index]),
            profiles=dict(Counter(found.profile_of(device) for device in by_stage[index])),
            first=[device.id for device in by_stage[index][:FIRST]],
            at_least_s=_sending_s(len(by_stage[index]), strategy) + stage.soak_s,
            approval=stage.approval,
        )
        for index, stage in enumerate(strategy.stages)
    ]


def _sending_s(devices: int, strategy: RolloutStrategy) -> float:
    """Seconds that the rate takes to send to so many, at its beginning."""
    return 60 * max(devices - 1, 0) / strategy.rate.per_minute if strategy.rate is not None else 0.0


def _links(found: Survey) -> list[PreviewLink]:
    counts: Counter[str] = Counter()
    metered: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for device in found.devices:
        link = device.facts.get("link") or {}
        kind = str(link.get("type") or "unknown")
        counts[kind] += 1
        metered[kind] += bool(link.get("metered"))
        sizes[kind] += found.variant_of(device).size or 0
    return [
        PreviewLink(link=kind, devices=counts[kind], metered=metered[kind], bytes=sizes[kind])
        for kind in sorted(counts)
    ]


def _broadcast(found: Survey, stages: Sequence[PreviewStage]) -> int:
    sizes = {found.names[profile_id]: variant.size or 0 for profile_id, variant in found.variants.items()}
    return sum(sizes[profile] for stage in stages for profile in stage.profiles)


def _problems(found: Survey, wanted: RolloutCreate) -> list[PreviewProblem]:
    problems = []

    def add(code: str, detail: str, devices: Sequence[str], *, blocks: bool) -> None:
        problems.append(PreviewProblem(code=code, detail=detail, devices=list(devices[:SHOWN]), blocks=blocks))

    if found.strangers:
        add("device_without_profile", "no profile matches these devices: create one, pin them, or leave them out",
            found.strangers, blocks=True)  # fmt: skip
    for why, devices in sorted(found.left_out.items()):
        add("no_self_update", f"left out: {why}", devices, blocks=not found.devices)
    for profile, devices in sorted(found.missing.items()):
        if wanted.of_agent:
            detail = f"{wanted.version} has no bundle for {profile}: `shoal agent-release push`"
            add("no_bundle_for_platform", detail, devices, blocks=True)
            continue
        detail = f"{wanted.version} has no variant that passed the gate for {profile}: `shoal variant build`"
        add("no_variant_for_profile", detail, devices, blocks=True)
    if found.unproven:
        unproven = [device.id for device in found.devices if found.profile_of(device) in found.unproven]
        detail = f"no device has measured the variant for {named(sorted(found.unproven))}: `shoal gate run`"
        add("variant_unproven", detail, unproven, blocks=not wanted.allow_unproven)
    if found.busy:
        ids = sorted({one.device_id for one in found.busy})
        rollouts = named(sorted({one.rollout_id for one in found.busy}))
        detail = f"still in rollout {rollouts}: wait, abort it, or supersede it (on_busy=supersede)"
        add("device_busy", detail, ids, blocks=wanted.on_busy == "refuse")
    held = [device.id for device in found.devices if device.hold]
    if held:
        add("device_held", "held back: they are sent nothing until somebody releases them", held, blocks=False)
    offline = [device.id for device in found.devices if not device.online]
    if offline:
        add("device_offline", "offline now: the stage they are in waits for them", offline, blocks=False)
    return problems
