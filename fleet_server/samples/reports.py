"""What devices say of samples: how their uploads go, and whether they keep what they should."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import msgspec
from sqlalchemy.orm import Session

from agent.protocol.messages import Reported
from agent.protocol.samples import UploadPhase, UploadReport
from fleet_server.models import Device, SampleRequestRow, SampleUpload
from fleet_server.rollouts.sampling import SampleOrders
from fleet_server.samples import repository, telling
from fleet_server.samples.schemas import UploadState

ENDED = frozenset({UploadPhase.DONE, UploadPhase.FAILED})


def apply_reports(session: Session, said: Sequence[tuple[Device, Reported]], now: dt.datetime) -> set[str]:
    """Bring uploads to where their devices say they are.

    Returns:
        The devices, by id, that are to be told anew: an upload is over, or they keep what they should not. That is so
        after a device changed its profile: rules are those of a profile, whoever changed it.
    """
    reports = {
        device.id: {one.upload_id: one for one in reported.samples.uploads}
        for device, reported in said
        if reported.samples is not None and reported.samples.uploads
    }
    to_tell = set()
    for upload in repository.told_to(session, reports):
        report = reports[upload.device_id].get(upload.id)
        if report is not None and _apply(session, upload, report, now):
            to_tell.add(upload.device_id)
    keeping = [
        (device, reported.samples)
        for device, reported in said
        if reported.samples is not None and reported.samples.allowed and reported.revision == device.desired_revision
    ]
    orders = SampleOrders(session, [device for device, _ in keeping])
    for device, samples in keeping:
        if set(samples.models) != {one.model for one in orders.sampling(device)}:
            to_tell.add(device.id)
    return to_tell


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
