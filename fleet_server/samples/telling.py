"""How uploads and requests end, and who is told: webhooks of the fleet, and the devices, which forget what is over."""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy.orm import Session

from fleet_server import events
from fleet_server.models import SampleRequestRow, SampleUpload
from fleet_server.samples import repository
from fleet_server.samples.schemas import RequestState, UploadState


def end(session: Session, upload: SampleUpload, state: UploadState, reason: str, detail: str, now: dt.datetime) -> None:
    """An upload ends without samples; what has come of it goes."""
    repository.forget_pieces(session, upload.id)
    upload.phase, upload.reason, upload.detail = state.value, reason, detail
    upload.told, upload.waiting, upload.finished_at, upload.received = False, None, now, 0


def upload_ended(session: Session, upload: SampleUpload, request: SampleRequestRow) -> None:
    """Tell how one ended: `shoal.samples.stored`, `.empty`, `.failed`."""

    def data() -> dict[str, Any]:
        return {
            "id": upload.id,
            "request_id": request.id,
            "device_id": upload.device_id,
            "model": request.model,
            "state": upload.phase,
            "samples": upload.samples,
            "size": upload.size,
            "digest": upload.digest,
            "reason": upload.reason,
            "detail": upload.detail,
        }

    kind = f"shoal.samples.{upload.phase}"
    events.emit(session, fleet_id=upload.fleet_id, kind=kind, subject=f"sample-request/{request.id}", data=data)


def finish_when_complete(session: Session, request: SampleRequestRow, now: dt.datetime) -> None:
    """A request is done when no device's part is open; `shoal.samples.done` says so."""
    session.flush()
    found = repository.uploads(session, request.id)
    if request.state != RequestState.RUNNING.value or any(one.phase in repository.OPEN for one in found):
        return
    request.state, request.finished_at = RequestState.DONE.value, now

    def data() -> dict[str, Any]:
        stored = [one for one in found if one.phase == repository.STORED]
        return {
            "id": request.id,
            "model": request.model,
            "devices": len(found),
            "stored": len(stored),
            "samples": sum(one.samples for one in stored),
        }

    subject = f"sample-request/{request.id}"
    events.emit(session, fleet_id=request.fleet_id, kind="shoal.samples.done", subject=subject, data=data)
