"""What a device is told to run: its desired state, from the deployments that are desired on it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from agent.protocol.codec import encode
from agent.protocol.delivery import DeliveryPolicy
from agent.protocol.lifecycle import SETTLED, Phase
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Content, DataFile, Manifest
from agent.protocol.messages import DesiredDeployment, DesiredState, Exposure, OnProviderMissing, ProbationPolicy, Trial
from agent.protocol.release import DesiredRelease, ReleaseManifest
from agent.protocol.topics import DeviceTopic, device_topic
from agent.protocol.version import SPOKEN
from fleet_server import outbox
from fleet_server.agent_releases.service import manifest_of as manifest_of_release
from fleet_server.conversions.repository import open_trials
from fleet_server.db import pieces
from fleet_server.deltas import service as deltas
from fleet_server.devices import repository as device_repository
from fleet_server.devices import service as device_service
from fleet_server.devices.delivery import combined, policy_of, without_windows
from fleet_server.devices.schemas import ProfileSpec, ProfileUpdate
from fleet_server.domain.strategy import ProbationSpec, RolloutStrategy
from fleet_server.models import Deployment, Device, Profile, Rollout, Variant
from fleet_server.principals import Who
from fleet_server.rollouts import repository
from fleet_server.rollouts.sampling import SampleOrders
from fleet_server.rollouts.tracing import traceparent_for
from fleet_server.settings import Settings
from fleet_server.trust import service as trust

TOLD = 256  # devices of one LAN


def queue_desired(session: Session, settings: Settings, device: Device, *, resend: bool = False) -> None:
    """Write the device's desired state to the outbox: with a new revision, or as it is when only sent again."""
    queue_all(session, settings, [device], resend=resend)


def queue_all(session: Session, settings: Settings, devices: Sequence[Device], *, resend: bool = False) -> None:
    """Write the desired states of devices of one fleet to the outbox, as `queue_desired` does.

    What they share is read once: a wave is hundreds of devices, and others wait until it is written.
    """
    if not devices:
        return
    _hold(session, devices)
    for device in devices:
        if not resend:
            device.desired_revision += 1
    states = _States(session, settings, devices)
    outbox.enqueue_retained(
        session,
        fleet_id=devices[0].fleet_id,
        payloads={device_topic(device.id, DeviceTopic.DESIRED): encode(states.of(device)) for device in devices},
    )


def _hold(session: Session, devices: Sequence[Device]) -> None:
    """Let no other transaction tell them something else meanwhile: both would call it by the same revision.

    On SQLite only one writes anyway.
    """
    if session.get_bind().dialect.name == "sqlite":
        return
    for piece in pieces(sorted(device.id for device in devices)):
        query = select(Device).where(Device.id.in_(piece)).order_by(Device.id).with_for_update(key_share=True)
        session.scalars(query.execution_options(populate_existing=True)).all()


def neighbours(session: Session, fleet_id: str, lans: Collection[str]) -> list[Device]:
    """Devices that are told whom they have on some LANs."""
    return [one for lan in sorted(lans) for one in device_repository.on_lan(session, fleet_id, lan, TOLD)]


class _Lans:
    """Which devices of a LAN answer requests in another's place."""

    def __init__(self, session: Session, fleet_id: str) -> None:
        self._session, self._fleet_id = session, fleet_id
        self._known: dict[str, list[tuple[str, str]]] = {}

    def peers(self, device: Device) -> tuple[str, ...]:
        """Addresses of a device's peers, none of them its own."""
        lan = device.facts.get("balancing_lan")
        if not lan:
            return ()
        if lan not in self._known:
            others = device_repository.on_lan(self._session, self._fleet_id, lan, TOLD)
            self._known[lan] = [(one.id, one.facts.get("balancing_address") or "") for one in others]
        found = (place for one, place in self._known[lan] if place and one != device.id)
        return tuple(dict.fromkeys(found))[: LIMITS.peers]


class _States:
    """The desired states of some devices of one fleet, made of what is read for all of them together."""

    def __init__(self, session: Session, settings: Settings, devices: Sequence[Device]) -> None:
        self._settings = settings
        ids = [device.id for device in devices]
        self._deployments = repository.desired_on(session, ids)
        found = [one for of_device in self._deployments.values() for one in of_device]
        self._variants = repository.by_id(session, Variant, {one.variant_id for one in found})
        self._rollouts = repository.by_id(session, Rollout, {one.rollout_id for one in found})
        self._terms = {
            key: (RolloutStrategy.model_validate(one.strategy), policy_of(one.delivery))
            for key, one in self._rollouts.items()
        }
        profiles = repository.by_id(session, Profile, {one.profile_id for one in devices if one.profile_id})
        self._general = {key: policy_of(one.delivery) for key, one in profiles.items()}
        self._trials = open_trials(session, ids)
        self._samples = SampleOrders(session, devices)
        # Of what is there already, it need not be said how it may travel.
        coming = {str(self._variants[one.variant_id].digest) for one in found if Phase(one.phase) not in SETTLED}
        fleet_id = devices[0].fleet_id
        self._encodings = deltas.Offers(session, fleet_id, coming, ids)
        self._session, self._fleet_id = session, fleet_id
        self._lans = _Lans(session, fleet_id)
        self._known: dict[str, msgspec.Raw] = {}
        releases = {one.device_id for one in found if self._variants[one.variant_id].is_release}
        self._went_back = repository.released(session, set(ids) - releases)

    def of(self, device: Device) -> DesiredState:
        """One device's."""
        general = self._general.get(device.profile_id or "", policy_of(None))
        wanted = self._deployments.get(device.id, ())
        releases = [one for one in wanted if self._variants[one.variant_id].is_release]
        return DesiredState(
            protocol=SPOKEN,
            fleet=device.fleet_id,
            revision=device.desired_revision,
            deployments=tuple(self._deployment(one, general) for one in wanted if one not in releases),
            agent=self._release(releases[0], general) if releases else self._installed(device),
            telemetry_interval_s=self._settings.telemetry_interval_s,
            sampling=self._samples.sampling(device),
            sample_requests=self._samples.requests(device, without_windows(general)),
            peers=self._lans.peers(device),
            trials=tuple(
                Trial(
                    trial.id,
                    tuple(self._signed(one, one.trial_path) for one in msgspec.convert(run.candidates, list[Manifest])),
                    msgspec.convert(run.data, DataFile),
                    self._settings.gate_candidate_timeout_s,
                    without_windows(general),  # a run has a deadline
                )
                for trial, run in self._trials.get(device.id, ())
            ),
        )

    def _deployment(self, deployment: Deployment, general: DeliveryPolicy) -> DesiredDeployment:
        variant, (strategy, delivery) = self._variants[deployment.variant_id], self._terms[deployment.rollout_id]
        manifest, back = self._manifest(deployment), bool(deployment.revert_of)
        probation = _probation(self._settings, strategy.probation, variant, back=back)
        policy = combined(general, delivery)
        travels = Phase(deployment.phase) not in SETTLED
        return DesiredDeployment(
            deployment_id=deployment.id,
            manifest=self._signed(manifest, manifest.target_path),
            probation_s=probation.seconds,
            probation=probation,
            encodings=self._encodings.of(manifest.digest, deployment.device_id) if travels else (),
            delivery=without_windows(policy) if back else policy,
            exposure=msgspec.convert(deployment.exposure, Exposure) if deployment.exposure else None,
            traceparent=traceparent_for(self._rollouts[deployment.rollout_id]) if travels else "",
        )

    def _release(self, deployment: Deployment, general: DeliveryPolicy) -> DesiredRelease:
        manifest = manifest_of_release(self._variants[deployment.variant_id])
        _, delivery = self._terms[deployment.rollout_id]
        policy, back = combined(general, delivery), bool(deployment.revert_of)
        travels = Phase(deployment.phase) not in SETTLED
        return DesiredRelease(
            deployment.id,
            self._signed(manifest, manifest.target_path),
            confirm_s=self._settings.agent_confirm_s,
            encodings=self._encodings.of(manifest.digest, deployment.device_id) if travels else (),
            delivery=without_windows(policy) if back else policy,
        )

    def _installed(self, device: Device) -> DesiredRelease | None:
        """What a device whose release was taken back without one before goes back to."""
        last = self._went_back.get(device.id)
        return DesiredRelease(f"back-{last}") if last is not None else None

    def _signed(self, manifest: Manifest | ReleaseManifest, path: str) -> msgspec.Raw:
        """A manifest as it was signed; one that never was is sent all the same: the device refuses it, and says so."""
        if path not in self._known:
            signed = trust.manifest_as_signed(self._session, self._fleet_id, path)
            self._known[path] = msgspec.Raw(signed or msgspec.json.encode(manifest))
        return self._known[path]

    def _manifest(self, deployment: Deployment) -> Manifest:
        return manifest_of_variant(self._variants[deployment.variant_id])


def _probation(settings: Settings, spec: ProbationSpec, variant: Variant, *, back: bool) -> ProbationPolicy:
    """How a device is to watch what it is sent; a memory budget holds for it where the rollout names no other.

    What takes a device back has proved itself, and may be slower than what it takes back: only a crash undoes that.
    """
    budget = ProfileSpec.model_validate(variant.profile_spec).budgets.memory_mb
    measured = (variant.measurements or {}).get("memory_mb")
    if back:
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
        on_provider_missing=OnProviderMissing(spec.on_provider_missing),
    )


def change_profile(
    session: Session, settings: Settings, fleet_id: str, name: str, change: ProfileUpdate, *, actor: Who
) -> Profile:
    """Change a profile's delivery policy, and tell its devices.

    Raises:
        NotFoundError: when there is no such profile.
    """
    profile, devices = device_service.change_delivery(session, fleet_id, name, change.delivery, actor=actor)
    queue_all(session, settings, devices)
    return profile


def contents_of_variant(variant: Variant) -> Sequence[Content]:
    """What a device fetches to run a variant."""
    return (manifest_of_release(variant),) if variant.is_release else manifest_of_variant(variant).contents


def manifest_of_variant(variant: Variant) -> Manifest:
    """What a variant's artifact is."""
    return msgspec.convert(variant.manifest, Manifest)
