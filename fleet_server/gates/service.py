"""Rules of gate runs. Each function works in its caller's transaction."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Content, DataFile, Manifest, Precision
from agent.protocol.messages import Reported, TrialPhase, TrialResult
from converters.job import Candidate
from fleet_server import audit
from fleet_server.catalog import repository as catalog
from fleet_server.catalog.schemas import GateSpec, GateVerdict, VariantState
from fleet_server.catalog.service import resolve_version
from fleet_server.clock import utc_now
from fleet_server.conversions import repository as conversions
from fleet_server.conversions.gate import References, judge
from fleet_server.conversions.service import build_target, manifest_of, settle
from fleet_server.devices.schemas import ProfileSpec
from fleet_server.devices.service import get_device, get_profile
from fleet_server.errors import ConflictError, InvalidError, NotFoundError
from fleet_server.gates import repository
from fleet_server.gates.judging import choose_on_devices, device_checks
from fleet_server.gates.schemas import GateRunCreate, GateRunState, GateRunView, GateTrialView
from fleet_server.models import Device, GateRun, GateTrial, Model, Profile, Variant, Version
from fleet_server.principals import Who
from fleet_server.rollouts.desired import queue_all, queue_desired
from fleet_server.schemas import Failure
from fleet_server.settings import Settings
from fleet_server.trust import service as trust

ENDED = frozenset({TrialPhase.DONE.value, TrialPhase.FAILED.value})


def start(session: Session, settings: Settings, fleet_id: str, wanted: GateRunCreate, *, actor: Who) -> GateRun:
    """Send a variant's candidates to devices of its profile, to be measured there.

    Raises:
        NotFoundError: for an unknown version, profile or device.
        InvalidError: when the version has no evaluation set, or one that is too large to send.
        ConflictError: when the variant is not built, is being measured already, or no device is there, or when a
            candidate is not signed.
    """
    version = resolve_version(session, fleet_id, wanted.version)
    profile = get_profile(session, fleet_id, wanted.profile)
    variant = _measurable(session, version, profile, wanted)
    data = _evaluation(session, settings, version, wanted.version)
    devices = _devices(session, fleet_id, profile, wanted)
    spec = ProfileSpec.model_validate(variant.profile_spec)
    manifests = [manifest_of(session, variant, version, spec, one) for one in _sent(session, variant)]
    paths = [trust.want(session, fleet_id, one, trial=True) for one in manifests]
    trust.require_signed(session, settings, fleet_id, paths, f"the candidates of {wanted.version}")
    now = utc_now()
    run = GateRun(
        fleet_id=fleet_id,
        variant_id=variant.id,
        state=GateRunState.RUNNING.value,
        candidates=msgspec.to_builtins(manifests),
        data=msgspec.to_builtins(data),
        created_at=now,
        deadline_at=now + dt.timedelta(seconds=wanted.timeout_s),
    )
    session.add(run)
    session.flush()
    for device in devices:
        session.add(GateTrial(fleet_id=fleet_id, run_id=run.id, device_id=device.id))
    session.flush()
    for device in devices:
        queue_desired(session, settings, device)
    detail = wanted.model_dump(mode="json") | {"devices": [device.id for device in devices]}
    audit.record(
        session, fleet_id=fleet_id, actor=actor, action="gate.run", subject=f"variant/{variant.id}", detail=detail
    )
    return run


def _measurable(session: Session, version: Version, profile: Profile, wanted: GateRunCreate) -> Variant:
    variant = catalog.variant_of(session, version.id, profile.id)
    build = f"`shoal variant build {wanted.version} --profile {wanted.profile}`"
    if variant is None or not catalog.candidate_digests(session, variant.id):
        raise ConflictError(
            "variant_not_built", f"{wanted.version} was not built for {wanted.profile!r}: {build} --rebuild"
        )
    if variant.state not in {VariantState.READY.value, VariantState.REFUSED.value}:
        raise ConflictError("variant_not_built", f"the variant is {variant.state}: wait for it, or {build}")
    running = catalog.open_gate_run(session, [variant.id])
    if running is not None:
        raise ConflictError("gate_running", f"gate run {running} measures it now: wait, or cancel that one")
    return variant


def _evaluation(session: Session, settings: Settings, version: Version, reference: str) -> DataFile:
    blob = catalog.blob(session, version.fleet_id, version.evaluation_digest) if version.evaluation_digest else None
    if blob is None:
        raise InvalidError(
            "no_evaluation", f"{reference} has no evaluation set: push a version with one", field="version"
        )
    if blob.size > settings.gate_data_mb << 20:
        raise InvalidError(
            "evaluation_too_large",
            f"the evaluation set has {blob.size / 2**20:.0f} MiB, at most {settings.gate_data_mb} are sent to devices "
            "(SHOAL_GATE_DATA_MB): push a version with a smaller one, or raise the bound",
            field="version",
        )
    return DataFile(blob.digest, blob.size, LIMITS.chunk_bytes)


def _devices(session: Session, fleet_id: str, profile: Profile, wanted: GateRunCreate) -> Sequence[Device]:
    if not wanted.devices:
        found = repository.online_devices(session, fleet_id, profile.id, wanted.count)
        if not found:
            raise ConflictError(
                "no_device_online",
                f"no device of profile {profile.name!r} is online: start one; till then the variant is unproven, and "
                "a rollout of it must allow that (--allow-unproven)",
            )
        return found
    named = [get_device(session, fleet_id, one) for one in dict.fromkeys(wanted.devices)]
    for device in named:
        if device.profile_id != profile.id:
            raise ConflictError("wrong_profile", f"device {device.id!r} is not of profile {profile.name!r}")
        if not device.online:
            raise ConflictError("device_offline", f"device {device.id!r} is offline: start its agent, or name another")
    return named


def _sent(session: Session, variant: Variant) -> list[Candidate]:
    """The candidates to measure, fp32 first: its answers and its time are what the others are compared with.

    Where there are too many for one trial, those stay behind that promise least by what was measured at the build.
    """
    kept = catalog.candidate_digests(session, variant.id)
    built = [one for one in _candidates(variant) if one.digest in kept]
    if conversions.is_deployed(session, variant.id):
        built = [one for one in built if one.digest == variant.digest or one.precision is Precision.FP32]
    distinct = {one.digest: one for one in built}.values()
    return sorted(distinct, key=_promise)[: LIMITS.trial_candidates]


def _promise(one: Candidate) -> tuple[bool, bool, float]:
    latency = one.measurements.latency_p50_ms if one.measurements else float("inf")
    return one.precision is not Precision.FP32, not one.within_budgets, latency


def _candidates(variant: Variant) -> list[Candidate]:
    return msgspec.convert(variant.candidates, list[Candidate])


def apply_reports(session: Session, said: Sequence[tuple[Device, Reported]], now: dt.datetime) -> set[str]:
    """Bring trials to where their devices say they are, and judge runs that are complete by that.

    Returns:
        The devices, by id, that are to be told of it: they need measure no more.
    """
    reports = {device.id: {one.trial_id: one for one in reported.trials} for device, reported in said}
    measuring = [device_id for device_id, of_device in reports.items() if of_device]
    ended: dict[str, GateRun] = {}
    to_tell = set()
    for device_id, trials in conversions.open_trials(session, measuring).items():
        for trial, run in trials:
            report = reports[device_id].get(trial.id)
            if report is None:
                continue
            sent = {one["digest"] for one in run.candidates}
            trial.phase = report.phase.value
            trial.results = [msgspec.to_builtins(one) for one in report.results if one.digest in sent]
            if report.failure is not None:
                trial.failure = {"code": report.failure.code.value, "detail": report.failure.detail[:2000]}
            if trial.phase in ENDED:
                ended[run.id] = run
                to_tell.add(device_id)
    if ended:
        session.flush()
    for run in ended.values():
        _finish_when_complete(session, run, now)
    return to_tell


def expire(session: Session, settings: Settings, now: dt.datetime) -> int:
    """End runs that are past their deadline by what their devices have measured; returns how many.

    A device that was forgotten meanwhile is not waited for.
    """
    for trial in repository.forgotten(session):
        _give_up(trial, "forgotten", "the device was forgotten while the gate run waited for it")
        session.flush()
        _finish_when_complete(session, session.get_one(GateRun, trial.run_id), now)
    found = repository.overdue(session, now)
    for run in found:
        for trial in repository.trials(session, run.id):
            if trial.phase not in ENDED:
                _give_up(trial, "timeout", "it had not finished when the gate run's time was over")
        session.flush()
        _finish_when_complete(session, run, now)
        _tell(session, settings, run)
    return len(found)


def _give_up(trial: GateTrial, code: str, detail: str) -> None:
    trial.phase, trial.failure = TrialPhase.FAILED.value, {"code": code, "detail": detail}


def cancel(session: Session, settings: Settings, fleet_id: str, run_id: str, *, actor: Who) -> GateRun:
    """End a run; its devices stop measuring, and the variant is as it was.

    Raises:
        NotFoundError: when it is not there.
        ConflictError: when it is over.
    """
    run = get_run(session, fleet_id, run_id)
    if run.state != GateRunState.RUNNING.value:
        raise ConflictError("gate_run_over", f"gate run {run_id} is {run.state}: there is nothing to cancel")
    run.state, run.finished_at, run.detail = GateRunState.CANCELLED.value, utc_now(), "cancelled"
    session.flush()
    _tell(session, settings, run)
    audit.record(session, fleet_id=fleet_id, actor=actor, action="gate.cancel", subject=f"gate-run/{run.id}")
    return run


def _tell(session: Session, settings: Settings, run: GateRun) -> None:
    devices = [session.get_one(Device, trial.device_id) for trial in repository.trials(session, run.id)]
    queue_all(session, settings, devices)


def _finish_when_complete(session: Session, run: GateRun, now: dt.datetime) -> None:
    trials = repository.trials(session, run.id)
    if any(trial.phase not in ENDED for trial in trials):
        return
    run.finished_at = now
    done = [trial for trial in trials if trial.phase == TrialPhase.DONE.value]
    failed = "; ".join(
        f"{one.device_id}: {(one.failure or {}).get('detail', 'failed')}" for one in trials if one not in done
    )
    variant = session.get_one(Variant, run.variant_id)
    if not done:
        run.state, run.detail = GateRunState.FAILED.value, failed
        return
    if variant.state not in {VariantState.READY.value, VariantState.REFUSED.value}:
        run.state, run.detail = GateRunState.CANCELLED.value, "the variant was built again meanwhile"
        return
    verdict = _judge(session, variant, done)
    state = GateRunState.PASSED if verdict.passed else GateRunState.REFUSED
    missed = "; ".join(check.detail for check in verdict.checks if not check.holds)
    run.state, run.verdict = state.value, verdict.model_dump(mode="json")
    run.detail = "; ".join(part for part in (missed or "every check holds", failed) if part)
    audit.record(
        session,
        fleet_id=run.fleet_id,
        actor="server",
        action=f"gate.{state.value}",
        subject=f"variant/{variant.id}",
        detail={"run": run.id, "detail": run.detail},
    )


def _judge(session: Session, variant: Variant, done: Sequence[GateTrial]) -> GateVerdict:
    version = session.get_one(Version, variant.version_id)
    spec = ProfileSpec.model_validate(variant.profile_spec)
    target = build_target(session.get_one(Profile, variant.profile_id).name, spec)
    references = msgspec.convert(variant.judged_against, References)
    results = {
        trial.device_id: {one.digest: one for one in msgspec.convert(trial.results, list[TrialResult])}
        for trial in done
    }
    sent = {digest for of_device in results.values() for digest in of_device}
    only = variant.digest if conversions.is_deployed(session, variant.id) else None
    outcome = choose_on_devices(_candidates(variant), results, target, references.source, only=only)
    where = ", ".join(sorted(results))
    variant.candidates = msgspec.to_builtins(outcome.candidates)
    if outcome.chosen is None:
        reasons = "; ".join(f"{one.recipe}: {one.fate}" for one in outcome.candidates if one.digest in sent)
        verdict = GateVerdict(passed=False, measured_on=where, checks=[])
        variant.gate, variant.state = verdict.model_dump(mode="json"), VariantState.REFUSED.value
        variant.failure = {"code": "no_candidate", "detail": f"no candidate ran on the device: {reasons}"[:2000]}
        return verdict
    picked = outcome.candidates[outcome.chosen]
    assert picked.measurements is not None
    verdict = judge(references, picked, spec.budgets, GateSpec.model_validate(version.gate), measured_on=where)
    checks = [*verdict.checks, *device_checks(picked.measurements, outcome.plain, target)]
    whole = GateVerdict(passed=all(check.holds for check in checks), measured_on=where, checks=checks)
    variant.failure = None
    settle(session, variant, version, picked, whole)
    return whole


def entitled(session: Session, device_id: str, digest: str) -> Content | None:
    """The file of a digest that a device is to fetch for a trial; None when it is none of those."""
    for _, run in conversions.open_trials(session, [device_id]).get(device_id, ()):
        if run.data["digest"] == digest:
            return msgspec.convert(run.data, DataFile)
        for one in msgspec.convert(run.candidates, list[Manifest]):
            if one.digest == digest:
                return one
    return None


def get_run(session: Session, fleet_id: str, run_id: str) -> GateRun:
    """One gate run.

    Raises:
        NotFoundError: when it is not there.
    """
    run = repository.run(session, fleet_id, run_id)
    if run is None:
        raise NotFoundError("gate_run", run_id, remedy="list them with `shoal gate list`")
    return run


def run_view(session: Session, run: GateRun) -> GateRunView:
    """The HTTP shape of a gate run."""
    variant = session.get_one(Variant, run.variant_id)
    version = session.get_one(Version, variant.version_id)
    recipes = {one["digest"]: one["recipe"] for one in variant.candidates}
    trials = [
        GateTrialView(
            device_id=trial.device_id,
            phase=trial.phase,
            results=[{"recipe": recipes.get(one["digest"]), **one} for one in trial.results],
            failure=Failure.model_validate(trial.failure) if trial.failure else None,
        )
        for trial in repository.trials(session, run.id)
    ]
    return GateRunView(
        id=run.id,
        variant_id=run.variant_id,
        model=session.get_one(Model, version.model_id).name,
        version=version.name,
        profile=session.get_one(Profile, variant.profile_id).name,
        state=GateRunState(run.state),
        detail=run.detail,
        candidates=len(run.candidates),
        trials=trials,
        verdict=GateVerdict.model_validate(run.verdict) if run.verdict else None,
        created_at=run.created_at,
        deadline_at=run.deadline_at,
        finished_at=run.finished_at,
    )
