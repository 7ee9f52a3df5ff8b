"""What devices say of samples: how their uploads go, and whether they keep what they should."""

from __future__ import annotations

import datetime as dt

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.messages import Reported
from agent.protocol.samples import UploadPhase, UploadReport
from fleet_server.models import Device, SampleRequestRow, SampleUpload
from fleet_server.rollouts.desired import queue_desired
from fleet_server.rollouts.sampling import SampleOrders
from fleet_server.samples import repository, telling
from fleet_server.samples.schemas import UploadState
from fleet_server.settings import Settings

ENDED = frozenset({UploadPhase.DONE, UploadPhase.FAILED})


def apply_report(session: Session, settings: Settings, device: Device, reported: Reported, now: dt.datetime) -> None:
    """Bring a device's uploads to where it says they are, and tell it anew where it keeps what it should not.

    That is so after it changed its profile: rules are those of a profile, whoever changed it.
    """
    said = reported.samples
    if said is None:
        return
    reports = {one.upload_id: one for one in said.uploads}
    told = repository.told_to(session, device.id) if reports else ()
    ended = [_apply(session, one, reports[one.id], now) for one in told if one.id in reports]
    stale = False
    if said.allowed and reported.revision == device.desired_revision:
        wanted = SampleOrders(session, [device]).sampling(device)
        stale = set(said.models) != {one.model for one in wanted}
    if any(ended) or stale:
        queue_desired(session, settings, device)


def _apply(session: Session, upload: SampleUpload, report: UploadReport, now: dt.datetime) -> bool:
    """Whether the device need not be told of it any more."""
    if upload.phase == UploadState.STORED.value:
        upload.told = report.phase not in ENDED
        return not upload.told
    if report.phase not in ENDED:
        upload.samples = report.samples
        upload.waiting = None if report.waiting is None else msgspec.to_builtins(report.waiting)
        if report.phase is UploadPhase.SENDING:
            upload.phase = UploadState.SENDING.value
        return False
    state, reason, detail = UploadState.FAILED, report.reason, report.detail
    if report.phase is UploadPhase.DONE and report.samples == 0:
        state = UploadState.EMPTY
    elif report.phase is UploadPhase.DONE:  # of a database that is older than what the device has seen
        reason, detail = "lost", "the device sent it, and this server has it no more: ask again"
    telling.end(session, upload, state, reason, detail, now)
    request = session.get_one(SampleRequestRow, upload.request_id)
    telling.upload_ended(session, upload, request)
    telling.finish_when_complete(session, request, now)
    return True
