"""Rules of samples. Each function works in its caller's transaction."""

from __future__ import annotations

import datetime as dt
from collections import Counter

from sqlalchemy.orm import Session

from agent.protocol.limits import LIMITS, MIB
from agent.protocol.samples import FEATURE
from fleet_server import audit
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.catalog.service import get_model
from fleet_server.clock import utc_now
from fleet_server.devices import repository as devices
from fleet_server.devices.service import chosen_devices, get_profile
from fleet_server.errors import ConflictError, NotFoundError
from fleet_server.models import Device, SampleRequestRow, SampleUpload, SamplingRule
from fleet_server.principals import Who
from fleet_server.rollouts.desired import queue_all
from fleet_server.samples import repository, telling
from fleet_server.samples.schemas import (
    MOST_DEVICES,
    RequestState,
    SampleRequestCreate,
    SampleRequestView,
    SampleSetDetail,
    SampleSetView,
    SampleUploadView,
    SamplingRuleView,
    SamplingSpec,
    UploadState,
)
from fleet_server.settings import Settings


def set_rule(
    session: Session, settings: Settings, fleet_id: str, model: str, profile: str, spec: SamplingSpec, *, actor: Who
) -> SamplingRuleView:
    """Let devices of a profile keep samples of a model, or change which; they are told.

    Raises:
        NotFoundError: for an unknown model or profile.
    """
    found_model, found_profile = get_model(session, fleet_id, model), get_profile(session, fleet_id, profile)
    row = repository.rule(session, fleet_id, model, profile)
    before = None if row is None else row.spec
    wanted = spec.model_dump(mode="json")
    if row is None:
        row = SamplingRule(
            fleet_id=fleet_id, model_id=found_model.id, profile_id=found_profile.id, spec=wanted, created_by=str(actor)
        )
        session.add(row)
    row.spec = wanted
    session.flush()
    if before != wanted:
        queue_all(session, settings, devices.with_profile(session, fleet_id, found_profile.id))
    subject = f"sampling-rule/{model}/{profile}"
    audit.record(
        session, fleet_id=fleet_id, actor=actor, action="sampling.set", subject=subject, before=before, after=wanted
    )
    return rule_view(row, model, profile)


def get_rule(session: Session, fleet_id: str, model: str, profile: str) -> SamplingRule:
    """The rule of a model and a profile.

    Raises:
        NotFoundError: when there is none.
    """
    row = repository.rule(session, fleet_id, model, profile)
    if row is None:
        name = f"{model}/{profile}"
        raise NotFoundError("sampling_rule", name, remedy="nothing of it is kept there; see `shoal sample rules`")
    return row


def remove_rule(
    session: Session, settings: Settings, row: SamplingRule, model: str, profile: str, *, actor: Who
) -> None:
    """Let devices of a profile keep no samples of a model any more; what they have of it, they forget."""
    before, profile_id = row.spec, row.profile_id
    session.delete(row)
    session.flush()
    queue_all(session, settings, devices.with_profile(session, row.fleet_id, profile_id))
    subject = f"sampling-rule/{model}/{profile}"
    audit.record(session, fleet_id=row.fleet_id, actor=actor, action="sampling.delete", subject=subject, before=before)


def rule_view(row: SamplingRule, model: str, profile: str) -> SamplingRuleView:
    """The HTTP shape of a rule."""
    return SamplingRuleView(
        model=model,
        profile=profile,
        spec=SamplingSpec.model_validate(row.spec),
        created_by=row.created_by,
        created_at=row.created_at,
    )


def ask(
    session: Session, settings: Settings, fleet_id: str, wanted: SampleRequestCreate, *, actor: Who
) -> SampleRequestRow:
    """Ask devices for what they keep of a model.

    Raises:
        NotFoundError: for an unknown model or device.
        InvalidError: when no device is meant, or too many, or the query can't be read.
    """
    get_model(session, fleet_id, wanted.model)
    found = chosen_devices(session, fleet_id, wanted.devices, wanted.query, most=MOST_DEVICES)
    now = utc_now()
    row = SampleRequestRow(
        fleet_id=fleet_id,
        model=wanted.model,
        state=RequestState.RUNNING.value,
        samples=wanted.samples,
        size=int(wanted.megabytes * MIB),
        created_by=str(actor),
        created_at=now,
        deadline_at=now + dt.timedelta(seconds=wanted.timeout_s),
    )
    session.add(row)
    session.flush()
    profiles = repository.profiles_of(session, fleet_id, wanted.model)
    told = repository.told_counts(session, [one.id for one in found])
    asked = []
    for device in found:
        upload = SampleUpload(
            fleet_id=fleet_id, request_id=row.id, device_id=device.id, phase=UploadState.PENDING.value
        )
        session.add(upload)
        session.flush()
        why = _hopeless(device, profiles, told[device.id], wanted.model)
        if why is None:
            asked.append(device)
            continue
        telling.end(session, upload, UploadState.FAILED, *why, now)
        telling.upload_ended(session, upload, row)
    telling.finish_when_complete(session, row, now)
    queue_all(session, settings, asked)
    detail = wanted.model_dump(mode="json") | {"devices": [one.id for one in found][:100], "asked": len(asked)}
    audit.record(
        session, fleet_id=fleet_id, actor=actor, action="samples.request", subject=f"sample-request/{row.id}",
        detail=detail,
    )  # fmt: skip
    return row


def _hopeless(device: Device, profiles: set[str], told: int, model: str) -> tuple[str, str] | None:
    """Why a device need not be asked: a reason, and a sentence."""
    if FEATURE not in device.facts.get("features", ()):
        return "agent_too_old", "its agent knows no samples: upgrade it"
    if device.profile_id not in profiles:
        return "off", f"no samples of {model} are kept on its profile: turn them on with `shoal sample keep`"
    if told >= LIMITS.sample_requests:
        return "too_many", f"it is asked for {told} uploads already: wait, or cancel one"
    return None


def cancel(session: Session, settings: Settings, row: SampleRequestRow, *, actor: Who) -> None:
    """End a request; samples that have come stay.

    Raises:
        ConflictError: when it is over.
    """
    if row.state != RequestState.RUNNING.value:
        detail = f"sample request {row.id} is {row.state}: there is nothing to cancel"
        raise ConflictError("sample_request_over", detail)
    now = utc_now()
    row.state, row.finished_at = RequestState.CANCELLED.value, now
    _give_up(session, settings, row, UploadState.CANCELLED, "cancelled", "the request was cancelled", now)
    audit.record(
        session, fleet_id=row.fleet_id, actor=actor, action="samples.cancel", subject=f"sample-request/{row.id}"
    )


def expire(session: Session, settings: Settings, now: dt.datetime) -> int:
    """End requests whose time is over; how many."""
    found = repository.overdue(session, now)
    for row in found:
        detail = "it had not come when the request's time was over: is the device online? ask again with more time"
        _give_up(session, settings, row, UploadState.FAILED, "timeout", detail, now)
        telling.finish_when_complete(session, row, now)
    return len(found)


def _give_up(
    session: Session,
    settings: Settings,
    row: SampleRequestRow,
    state: UploadState,
    reason: str,
    detail: str,
    now: dt.datetime,
) -> None:
    uploads = [one for one in repository.uploads(session, row.id) if one.told]
    for one in uploads:
        if one.phase in repository.OPEN:
            waited = f"; it waited: {one.waiting['detail']}" if one.waiting else ""
            telling.end(session, one, state, reason, detail + waited, now)
            telling.upload_ended(session, one, row)
        one.told = False  # it is stored, and the device has not said that it knows
    session.flush()
    queue_all(session, settings, [session.get_one(Device, one.device_id) for one in uploads])


def get_request(session: Session, fleet_id: str, request_id: str) -> SampleRequestRow:
    """One request.

    Raises:
        NotFoundError: when it is not there.
    """
    row = repository.request(session, fleet_id, request_id)
    if row is None:
        raise NotFoundError("sample_request", request_id, remedy="list them with `shoal sample requests`")
    return row


def request_view(session: Session, row: SampleRequestRow) -> SampleRequestView:
    """The HTTP shape of a request."""
    uploads = [
        SampleUploadView.model_validate(
            {
                "id": one.id,
                "device_id": one.device_id,
                "state": one.phase,
                "samples": one.samples,
                "size": one.size,
                "received": one.received,
                "reason": one.reason,
                "detail": one.detail,
                "waiting": one.waiting,
            }
        )
        for one in repository.uploads(session, row.id)
    ]
    return SampleRequestView(
        id=row.id,
        model=row.model,
        state=RequestState(row.state),
        samples=row.samples,
        megabytes=row.size / MIB,
        uploads=uploads,
        counts=Counter(one.state for one in uploads),
        created_by=row.created_by,
        created_at=row.created_at,
        deadline_at=row.deadline_at,
        finished_at=row.finished_at,
    )


def get_set(session: Session, fleet_id: str, set_id: str) -> tuple[SampleUpload, SampleRequestRow]:
    """Samples that are here, and the request that they answer.

    Raises:
        NotFoundError: when they are not.
    """
    found = repository.sample_set(session, fleet_id, set_id)
    if found is None:
        raise NotFoundError("sample_set", set_id, remedy="list them with `shoal sample list`")
    return found


def set_view(upload: SampleUpload, request: SampleRequestRow, settings: Settings) -> SampleSetView:
    """The HTTP shape of samples that are here."""
    return SampleSetView.model_validate(_set_fields(upload, request, settings))


def set_detail(upload: SampleUpload, request: SampleRequestRow, settings: Settings) -> SampleSetDetail:
    """The same, with what is in the file."""
    return SampleSetDetail.model_validate(_set_fields(upload, request, settings) | {"listing": upload.listing or []})


def _set_fields(upload: SampleUpload, request: SampleRequestRow, settings: Settings) -> dict[str, object]:
    assert upload.stored_at is not None
    return {
        "id": upload.id,
        "request_id": request.id,
        "device_id": upload.device_id,
        "model": request.model,
        "samples": upload.samples,
        "size": upload.size,
        "digest": upload.digest,
        "stored_at": upload.stored_at,
        "kept_until": upload.stored_at + dt.timedelta(days=settings.samples_days),
    }


def note_download(session: Session, upload: SampleUpload, *, actor: Who) -> None:
    """Somebody has read them."""
    audit.record(
        session, fleet_id=upload.fleet_id, actor=actor, action="samples.download", subject=f"sample-set/{upload.id}"
    )


def remove_set(session: Session, store: ArtifactStore, upload: SampleUpload, *, actor: Who) -> None:
    """Delete samples. The bytes go first: what is left of one that is interrupted is a row, which goes next time.

    Raises:
        UnavailableError: when the artifact store does not answer; then they are still here.
    """
    if not repository.is_shared(session, upload):
        store.delete(upload.digest or "")
    upload.phase, upload.listing, upload.told = UploadState.DELETED.value, None, False
    audit.record(
        session, fleet_id=upload.fleet_id, actor=actor, action="samples.delete", subject=f"sample-set/{upload.id}",
        detail={"digest": upload.digest, "samples": upload.samples},
    )  # fmt: skip


def forget_old(session: Session, store: ArtifactStore, before: dt.datetime) -> int:
    """Delete some of the samples that came before a time; how many."""
    found = repository.stored_before(session, before, limit=100)
    for upload in found:
        remove_set(session, store, upload, actor="server")
        session.flush()
    return len(found)
