"""Rules of building variants: asking for them, claiming jobs, and writing down what came of them."""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import DataFile, Manifest, Precision, Scheduling
from converters.job import BuildResult, Candidate, JobError, Measurements, Target, TrainingOrder, Weights
from fleet_server import audit
from fleet_server.catalog import repository as catalog
from fleet_server.catalog.schemas import GateSpec, GateVerdict, TrainingPlan, VariantBuild, VariantState
from fleet_server.catalog.service import get_variant, processing_of, resolve_version
from fleet_server.conversions import repository
from fleet_server.conversions.files import data_name, file_name
from fleet_server.conversions.gate import References, judge
from fleet_server.conversions.resources import needs_of
from fleet_server.db import Database
from fleet_server.devices.schemas import ProfileSpec
from fleet_server.devices.service import get_profile
from fleet_server.errors import ConflictError, InvalidError
from fleet_server.models import Blob, ConversionJob, Model, Profile, SourceForm, Variant, Version
from fleet_server.principals import Who
from fleet_server.trust import service as trust

LEASE_S = 15.0
ATTEMPTS = 3
GATED = 5  # candidates that a gate run sends to devices, beside fp32
STEP_CHARS = 200
WAITS = "waits:"


@dataclass(frozen=True)
class ClaimedJob:
    """A job this process runs now. `attempt` fences: who comes with an older one has lost the job."""

    job_id: str
    variant_id: str
    owner: str
    attempt: int


def request_builds(session: Session, fleet_id: str, wanted: VariantBuild, *, actor: Who) -> list[str]:
    """Ask for a version's variants; returns their ids in the order of the profiles.

    Raises:
        NotFoundError: for an unknown version or profile.
        InvalidError: for training of what can't be trained.
        ConflictError: when `rebuild` would replace an artifact that devices run.
    """
    version = resolve_version(session, fleet_id, wanted.version)
    if wanted.training is not None:
        _check_trainable(version, wanted)
    profiles = [get_profile(session, fleet_id, name) for name in dict.fromkeys(wanted.profiles)]
    return [_request_build(session, version, profile, wanted, actor=actor) for profile in profiles]


def _check_trainable(version: Version, wanted: VariantBuild) -> None:
    if version.architecture is not None and version.training_digest is not None:
        return
    missing = "rows to train on" if version.architecture is not None else "weights of a registered architecture"
    remedy = "push a version with --architecture, --weights and --training, or use `shoal convert` on your machine"
    raise InvalidError("not_trainable", f"training: {wanted.version} has no {missing}: {remedy}", field="training")


def _request_build(session: Session, version: Version, profile: Profile, wanted: VariantBuild, *, actor: Who) -> str:
    variant = catalog.variant_of(session, version.id, profile.id)
    if variant is None:
        variant = Variant(fleet_id=version.fleet_id, version_id=version.id, profile_id=profile.id, candidates=[])
        session.add(variant)
    elif variant.state in _settled(rebuild=wanted.rebuild):
        return variant.id
    elif repository.is_deployed(session, variant.id):
        raise ConflictError(
            "variant_deployed",
            f"the variant of {wanted.version} for {profile.name!r} was rolled out and stays: push a new version",
        )
    elif (running := catalog.open_gate_run(session, [variant.id])) is not None:
        raise ConflictError("gate_running", f"gate run {running} measures it: cancel it first (`shoal gate cancel`)")
    variant.profile_spec, variant.state = profile.spec, VariantState.QUEUED.value
    variant.failure, variant.gate = None, None
    session.flush()
    training = wanted.training.model_dump(mode="json") if wanted.training else None
    work = _work(session, version, ProfileSpec.model_validate(profile.spec), training)
    session.add(ConversionJob(fleet_id=version.fleet_id, variant_id=variant.id, work=work, training=training))
    audit.record(
        session,
        fleet_id=version.fleet_id,
        actor=actor,
        action="variant.build",
        subject=f"variant/{variant.id}",
        detail={"version": wanted.version, "profile": profile.name},
    )
    session.flush()
    return variant.id


def _work(session: Session, version: Version, spec: ProfileSpec, training: dict[str, Any] | None) -> str:
    """A hash of the files to convert and how; budgets but that of accuracy only judge what was made."""
    forms = sorted((form.format, form.digest) for form in catalog.source_forms(session, version.id))
    how = [
        spec.runtime,
        spec.providers,
        spec.provider_options,
        sorted(spec.precisions),
        spec.budgets.accuracy_drop_points,
    ]
    parts = [forms, version.calibration_digest, version.evaluation_digest, how, needs_of(spec), training]
    parts += [version.processing] if version.processing else []
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _settled(*, rebuild: bool) -> set[str]:
    """States in which asking again changes nothing."""
    working = {VariantState.QUEUED.value, VariantState.BUILDING.value}
    return working if rebuild else working | {VariantState.READY.value}


def has_work(database: Database) -> bool:
    """Whether some job is queued or runs: asked several times a second, and nearly always there is none."""
    return database.finds(repository.HAS_WORK)


def claim(session: Session, owner: str, now: dt.datetime) -> ClaimedJob | None:
    """Take the next job; one whose runners died too often fails instead."""
    job = repository.next_job(session, now)
    if job is None or repository.is_done_by_another(session, job, now):
        return None
    if job.state == "running":
        job.lost += 1
    job.state, job.lease_owner, job.lease_until = "running", owner, now + dt.timedelta(seconds=LEASE_S)
    job.attempts += 1
    claimed = ClaimedJob(job.id, job.variant_id, owner, job.attempts)
    if _gave_up(session, claimed, now):
        return None
    job.started_at, job.progress, job.retry_at = now, 0.0, None
    job.step = job.step if job.step.startswith(WAITS) else "starting"
    session.get_one(Variant, job.variant_id).state = VariantState.BUILDING.value
    return claimed


def _gave_up(session: Session, claimed: ClaimedJob, now: dt.datetime) -> bool:
    """Fail a job whose runners died too often."""
    if session.get_one(ConversionJob, claimed.job_id).lost < ATTEMPTS:
        return False
    detail = f"its worker died {ATTEMPTS} times: see the log of the server and its workers, then build it again"
    fail(session, claimed, JobError("gave_up", detail), now)
    return True


def heartbeat(session: Session, claimed: ClaimedJob, now: dt.datetime, fraction: float, step: str) -> bool:
    """Keep the lease and say how far the job is; false when somebody else has taken it, or deleted its version."""
    if not holds(session, claimed):
        return False
    job = session.get_one(ConversionJob, claimed.job_id)
    job.lease_until, job.progress, job.step = (
        now + dt.timedelta(seconds=LEASE_S),
        min(max(fraction, 0.0), 1.0),
        step[:STEP_CHARS],
    )
    return True


def holds(session: Session, claimed: ClaimedJob) -> bool:
    """Whether a job is still there, running, and claimed by this owner at this attempt."""
    job = session.get(ConversionJob, claimed.job_id, with_for_update=True)
    return (
        job is not None
        and job.state == "running"
        and (job.lease_owner, job.attempts)
        == (
            claimed.owner,
            claimed.attempt,
        )
    )


def release(session: Session, claimed: ClaimedJob) -> None:
    """Give a job back, because this server is stopping."""
    if holds(session, claimed):
        _requeue(session, claimed)


def postpone(session: Session, claimed: ClaimedJob, reason: str, until: dt.datetime, *, begun: bool) -> bool:
    """Give a job back until a time, because what it needs is not there yet; its step says so.

    One that was not `begun` does not count as an attempt.

    Returns:
        Whether the reason is another than it waited for before.
    """
    if not holds(session, claimed):
        return False
    job = _requeue(session, claimed)
    before, job.step = job.step, f"{WAITS} {reason}"[:STEP_CHARS]
    job.progress, job.retry_at = 0.0, until
    job.attempts -= not begun
    return job.step != before


def lose(session: Session, claimed: ClaimedJob, now: dt.datetime) -> None:
    """Give a job back because its worker died; it fails where that happened too often."""
    if holds(session, claimed):
        session.get_one(ConversionJob, claimed.job_id).lost += 1
        if not _gave_up(session, claimed, now):
            _requeue(session, claimed)


def _requeue(session: Session, claimed: ClaimedJob) -> ConversionJob:
    job = session.get_one(ConversionJob, claimed.job_id)
    job.state, job.lease_owner, job.lease_until = "queued", None, None
    session.get_one(Variant, job.variant_id).state = VariantState.QUEUED.value
    return job


def cancel(session: Session, fleet_id: str, variant_id: str, now: dt.datetime, *, actor: Who) -> None:
    """Give up the building of a variant; whoever runs it finds its lease gone within `scheduler.HEARTBEAT_S`.

    Raises:
        NotFoundError: for an unknown variant.
        ConflictError: when it is not being built.
    """
    view = get_variant(session, fleet_id, variant_id)
    job = repository.open_job(session, variant_id)
    if job is None:
        raise ConflictError(
            "not_building", f"the variant is {view.state}, and nothing builds it: there is no more to do"
        )
    job.state, job.step, job.finished_at = "cancelled", "cancelled", now
    job.lease_owner, job.lease_until, job.retry_at = None, None, None
    variant = session.get_one(Variant, variant_id)
    variant.state = VariantState.CANCELLED.value
    variant.failure = {"code": "cancelled", "detail": f"{actor} cancelled its build: build it again to have it"}
    audit.record(
        session,
        fleet_id=fleet_id,
        actor=actor,
        action="variant.cancel",
        subject=f"variant/{variant_id}",
        detail={"version": f"{view.model}@{view.version}", "profile": view.profile},
    )
    session.flush()


def fail(session: Session, claimed: ClaimedJob, error: JobError, now: dt.datetime) -> None:
    """Write down that a variant could not be built, where it is still ours to say."""
    if not holds(session, claimed):
        return
    _finish(session, claimed, "failed", now)
    variant = session.get_one(Variant, claimed.variant_id)
    variant.state = VariantState.FAILED.value
    variant.failure = {"code": error.code, "detail": error.detail}


def complete(session: Session, claimed: ClaimedJob, result: BuildResult, now: dt.datetime) -> VariantState:
    """Judge what was built and write it down. The chosen artifact must be in the store already."""
    variant = session.get_one(Variant, claimed.variant_id)
    version = session.get_one(Version, variant.version_id)
    spec = ProfileSpec.model_validate(variant.profile_spec)
    variant.candidates = msgspec.to_builtins(result.candidates)
    if result.chosen is None:
        reasons = "; ".join(f"{one.recipe}: {one.error}" for one in result.candidates if one.error)
        fail(session, claimed, JobError("no_candidate", f"no recipe worked: {reasons}"[:2000]), now)
        return VariantState.FAILED
    references = References(result.source, result.baseline, result.baseline_version)
    variant.judged_against = msgspec.to_builtins(references)
    verdict = judge(references, result.candidates[result.chosen], spec.budgets, GateSpec.model_validate(version.gate))
    settle(session, variant, version, result.candidates[result.chosen], verdict)
    kept = gate_candidates(result)
    golden = {one.golden.digest for one in kept if one.golden is not None}
    catalog.keep_candidates(session, variant, {str(one.digest) for one in kept} | golden)
    manifests = [manifest_of(session, variant, version, spec, one) for one in kept]
    trust.want_trials(session, variant.fleet_id, variant.id, manifests)
    _finish(session, claimed, "succeeded", now)
    return VariantState(variant.state)


def gate_candidates(result: BuildResult) -> list[Candidate]:
    """Candidates worth measuring on a device: the picked one, fp32, and the fastest of those that are accurate enough.

    How fast and how large in memory they are, the device decides.
    """
    built = [one for one in result.candidates if one.measurements is not None]
    chosen = [result.candidates[result.chosen]] if result.chosen is not None else []
    plain = [one for one in built if one.precision is Precision.FP32][:1]
    kept = [one for one in built if one.measurements and _keeps_accuracy(one.measurements, result)]
    kept.sort(key=lambda one: one.measurements.latency_p50_ms if one.measurements else float("inf"))
    return list({one.digest: one for one in (*plain, *chosen, *kept[:GATED])}.values())


def _keeps_accuracy(measured: Measurements, result: BuildResult) -> bool:
    """As accurate as the picked one, or nearly so."""
    best = result.candidates[result.chosen].measurements if result.chosen is not None else None
    if best is None:
        return False
    return measured.quality >= best.quality - 0.01


def settle(session: Session, variant: Variant, version: Version, chosen: Candidate, verdict: GateVerdict) -> None:
    """Write down what was picked and what the gate says of it; what devices were told to run stays as it is."""
    spec = ProfileSpec.model_validate(variant.profile_spec)
    variant.gate = verdict.model_dump(mode="json")
    variant.precision = chosen.precision.value
    variant.measurements = msgspec.to_builtins(chosen.measurements)
    variant.lineage = msgspec.to_builtins(chosen.lineage)
    variant.state = (VariantState.READY if verdict.passed else VariantState.REFUSED).value
    if verdict.passed:
        manifest = manifest_of(session, variant, version, spec, chosen)
        variant.digest, variant.size = manifest.digest, manifest.size
        variant.manifest = msgspec.to_builtins(manifest)
        trust.want(session, variant.fleet_id, manifest)
        for content in manifest.contents:
            if catalog.blob(session, variant.fleet_id, content.digest) is None:
                session.add(Blob(fleet_id=variant.fleet_id, digest=content.digest, size=content.size))
    elif not repository.is_deployed(session, variant.id):
        variant.digest, variant.manifest = None, None
        variant.size = chosen.measurements.size if chosen.measurements else None


def build_target(name: str, spec: ProfileSpec) -> Target:
    """The part of a profile that conversion needs."""
    return Target(
        profile=name,
        runtime=spec.runtime,
        providers=tuple(spec.providers),
        precisions=tuple(spec.precisions),
        threads=spec.threads,
        provider_options=spec.provider_options,
        max_batch=spec.max_batch,
        objective=spec.objective,
        accuracy_drop_points=spec.budgets.accuracy_drop_points,
        latency_p95_ms=spec.budgets.latency_p95_ms,
        size_mb=spec.budgets.size_mb,
        memory_mb=spec.budgets.memory_mb,
    )


def training_order(version: Version, plan: TrainingPlan, weights: SourceForm) -> TrainingOrder:
    """What a build is to train first; its paths are names, as those of every order."""
    data = data_name(version.training_digest)
    assert data is not None
    return TrainingOrder(
        weights=weights_name(version, weights),
        data=data,
        **plan.model_dump(),
    )


def weights_name(version: Version, weights: SourceForm) -> Weights:
    """Weights of the store, by name."""
    assert version.architecture is not None
    return Weights(version.architecture, weights.digest, file_name(weights.digest, f".{weights.format}"))


def _finish(session: Session, claimed: ClaimedJob, state: str, now: dt.datetime) -> None:
    job = session.get_one(ConversionJob, claimed.job_id)
    job.state, job.finished_at, job.lease_owner, job.lease_until = state, now, None, None
    if state == "succeeded":
        job.progress, job.step = 1.0, "done"


def manifest_of(session: Session, variant: Variant, version: Version, spec: ProfileSpec, chosen: Candidate) -> Manifest:
    """What a device must know of a candidate to run it."""
    assert chosen.digest is not None
    assert chosen.format is not None
    assert chosen.measurements is not None
    return Manifest(
        digest=chosen.digest,
        size=chosen.measurements.size,
        chunk_size=LIMITS.chunk_bytes,
        model=session.get_one(Model, version.model_id).name,
        version=version.name,
        variant_id=variant.id,
        profile=session.get_one(Profile, variant.profile_id).name,
        format=chosen.format,
        runtime=spec.runtime,
        precision=chosen.precision,
        inputs=chosen.inputs,
        outputs=chosen.outputs,
        providers=tuple(spec.providers),
        threads=spec.threads,
        provider_options=spec.provider_options,
        max_batch=chosen.max_batch,
        labels=tuple(version.labels),
        golden=golden_of(chosen),
        scheduling=scheduling_of(spec),
        processing=processing_of(version),
    )


def scheduling_of(spec: ProfileSpec) -> Scheduling:
    """How devices of a profile answer requests."""
    return msgspec.convert(spec.scheduling.model_dump(), Scheduling)


def golden_of(candidate: Candidate) -> DataFile | None:
    """A candidate's golden inputs, as devices fetch them."""
    golden = candidate.golden
    return None if golden is None else DataFile(golden.digest, golden.size, LIMITS.chunk_bytes)


def baseline_of(session: Session, version: Version, profile_id: str) -> tuple[str, Manifest] | None:
    """The version and manifest that a new variant is compared with, when there is one."""
    found = repository.baseline_variant(session, version, profile_id)
    if found is None or found[0].manifest is None:
        return None
    return found[1].name, msgspec.convert(found[0].manifest, Manifest)
