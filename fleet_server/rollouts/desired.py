"""What a device is told to run: its desired state, from the deployments that are desired on it."""

from __future__ import annotations

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.codec import encode
from agent.protocol.delivery import DeliveryPolicy
from agent.protocol.lifecycle import SETTLED, Phase
from agent.protocol.manifest import DataFile, Encoding, Manifest, manifest_bytes
from agent.protocol.messages import DesiredDeployment, DesiredState, Exposure, ProbationPolicy, Trial
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.version import SPOKEN
from fleet_server import outbox
from fleet_server.conversions.repository import open_trials
from fleet_server.deltas import service as deltas
from fleet_server.devices import service as device_service
from fleet_server.devices.delivery import combined, policy_of, without_windows
from fleet_server.devices.schemas import ProfileSpec, ProfileUpdate
from fleet_server.domain.strategy import RolloutStrategy
from fleet_server.models import Deployment, Device, Profile, Rollout, Variant
from fleet_server.principals import Who
from fleet_server.rollouts import repository
from fleet_server.settings import Settings
from fleet_server.trust import service as trust


def queue_desired(session: Session, settings: Settings, device: Device, *, resend: bool = False) -> None:
    """Write the device's desired state to the outbox: with a new revision, or as it is when only sent again."""
    if not resend:
        device.desired_revision += 1
    profile = session.get(Profile, device.profile_id) if device.profile_id else None
    general = policy_of(profile.delivery if profile else None)
    state = DesiredState(
        protocol=SPOKEN,
        fleet=device.fleet_id,
        revision=device.desired_revision,
        deployments=tuple(
            DesiredDeployment(
                deployment_id=deployment.id,
                manifest=signed_manifest(session, deployment),
                probation_s=(policy := _policy(session, settings, deployment)).seconds,
                probation=policy,
                encodings=_encodings(session, deployment),
                delivery=_delivery(session, deployment, general),
                exposure=msgspec.convert(deployment.exposure, Exposure) if deployment.exposure else None,
            )
            for deployment in repository.desired(session, device.id)
        ),
        telemetry_interval_s=settings.telemetry_interval_s,
        trials=tuple(
            Trial(
                trial.id,
                tuple(
                    _signed(session, device.fleet_id, one, one.trial_path)
                    for one in msgspec.convert(run.candidates, list[Manifest])
                ),
                msgspec.convert(run.data, DataFile),
                settings.gate_candidate_timeout_s,
                without_windows(general),  # a run has a deadline
            )
            for trial, run in open_trials(session, device.id)
        ),
    )
    outbox.enqueue(
        session,
        fleet_id=device.fleet_id,
        topic=device_topic(device.id, DeviceTopic.DESIRED),
        payload=encode(state),
        retain=True,
    )


def _policy(session: Session, settings: Settings, deployment: Deployment) -> ProbationPolicy:
    """How a device is to watch what it is sent; a memory budget holds for it where the rollout names no other.

    What takes a device back has proved itself, and may be slower than what it takes back: only a crash undoes that.
    """
    spec = RolloutStrategy.model_validate(session.get_one(Rollout, deployment.rollout_id).strategy).probation
    variant = session.get_one(Variant, deployment.variant_id)
    budget = ProfileSpec.model_validate(variant.profile_spec).budgets.memory_mb
    measured = (variant.measurements or {}).get("memory_mb")
    if deployment.revert_of:
        return ProbationPolicy(
            seconds=settings.probation_s,
            error_share=1.0,
            latency_ratio=0.0,
            growth_mb=0.0,
            load_mb=measured,
            replace_when_short=spec.on_memory_short == "replace",
        )
    return ProbationPolicy(
        seconds=settings.probation_s if spec.seconds is None else spec.seconds,
        minimum_requests=spec.minimum_requests,
        at_most_s=spec.at_most_s or 0.0,
        error_share=spec.error_percent / 100,
        latency_ratio=spec.latency_p95_ratio,
        memory_mb=spec.memory_mb or (budget + spec.growth_mb if budget is not None else None),
        growth_mb=spec.growth_mb,
        load_mb=measured,
        replace_when_short=spec.on_memory_short == "replace",
    )


def _encodings(session: Session, deployment: Deployment) -> tuple[Encoding, ...]:
    """How what a deployment runs may travel; of what is there already, nothing need be said."""
    if Phase(deployment.phase) in SETTLED:
        return ()
    digest = manifest_of(session, deployment).digest
    return deltas.offered(session, deployment.fleet_id, digest, deployment.device_id)


def _delivery(session: Session, deployment: Deployment, general: DeliveryPolicy) -> DeliveryPolicy:
    policy = combined(general, policy_of(session.get_one(Rollout, deployment.rollout_id).delivery))
    return without_windows(policy) if deployment.revert_of else policy


def change_profile(
    session: Session, settings: Settings, fleet_id: str, name: str, change: ProfileUpdate, *, actor: Who
) -> Profile:
    """Change a profile's delivery policy, and tell its devices.

    Raises:
        NotFoundError: when there is no such profile.
    """
    profile, devices = device_service.change_delivery(session, fleet_id, name, change.delivery, actor=actor)
    for device in devices:
        queue_desired(session, settings, device)
    return profile


def manifest_of(session: Session, deployment: Deployment) -> Manifest:
    """What a deployment runs."""
    return manifest_of_variant(session.get_one(Variant, deployment.variant_id))


def manifest_of_variant(variant: Variant) -> Manifest:
    """What a variant's artifact is."""
    return msgspec.convert(variant.manifest, Manifest)


def signed_manifest(session: Session, deployment: Deployment) -> msgspec.Raw:
    """The bytes that were signed of what a deployment runs."""
    manifest = manifest_of(session, deployment)
    return _signed(session, deployment.fleet_id, manifest, manifest.target_path)


def _signed(session: Session, fleet_id: str, manifest: Manifest, path: str) -> msgspec.Raw:
    """A manifest as it was signed; one that never was is sent all the same: the device refuses it, and says so."""
    return msgspec.Raw(trust.manifest_as_signed(session, fleet_id, path) or manifest_bytes(manifest))
