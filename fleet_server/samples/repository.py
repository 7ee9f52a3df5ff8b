"""Every query over sampling rules, requests for samples, and uploads."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from fleet_server.db import rows_by, scalars_by
from fleet_server.models import Model, Profile, SamplePieceRow, SampleRequestRow, SampleUpload, SamplingRule
from fleet_server.paging import PageRequest, Rows, TableList
from fleet_server.samples.schemas import RequestState, UploadState

RULES = TableList(SamplingRule.id, {"created_at": SamplingRule.id}, default="created_at", time=SamplingRule.created_at)
REQUESTS = TableList(
    SampleRequestRow.id,
    {"created_at": SampleRequestRow.id, "deadline_at": SampleRequestRow.deadline_at},
    default="-created_at",
    time=SampleRequestRow.created_at,
)
SETS = TableList(
    SampleUpload.id,
    {"created_at": SampleUpload.id, "device_id": SampleUpload.device_id},
    default="-created_at",
    time=SampleUpload.stored_at,
    times="stored_",
)
STORED = UploadState.STORED.value
OPEN = (UploadState.PENDING.value, UploadState.SENDING.value)


def rule(session: Session, fleet_id: str, model: str, profile: str) -> SamplingRule | None:
    """The rule of a model and a profile, by their names."""
    query = (
        select(SamplingRule)
        .join(Model, Model.id == SamplingRule.model_id)
        .join(Profile, Profile.id == SamplingRule.profile_id)
        .where(SamplingRule.fleet_id == fleet_id, Model.name == model, Profile.name == profile)
    )
    return session.scalar(query)


def rules_page(session: Session, fleet_id: str, request: PageRequest) -> Rows[tuple[SamplingRule, str, str]]:
    """A page of rules, with the names of their models and profiles."""
    query = (
        select(SamplingRule, Model.name, Profile.name)
        .join(Model, Model.id == SamplingRule.model_id)
        .join(Profile, Profile.id == SamplingRule.profile_id)
        .where(SamplingRule.fleet_id == fleet_id)
    )
    return RULES.rows(session, query, request)


def profiles_of(session: Session, fleet_id: str, model: str) -> set[str]:
    """Ids of profiles whose devices are to keep samples of a model."""
    query = (
        select(SamplingRule.profile_id)
        .join(Model, Model.id == SamplingRule.model_id)
        .where(SamplingRule.fleet_id == fleet_id, Model.name == model)
    )
    return set(session.scalars(query))


def told_counts(session: Session, device_ids: Sequence[str]) -> Counter[str]:
    """How many uploads devices are asked for now."""
    device = SampleUpload.device_id
    query = select(device, func.count()).where(SampleUpload.told.is_(True)).group_by(device)
    return Counter({row[0]: row[1] for row in rows_by(session, query, device, device_ids)})


def request(session: Session, fleet_id: str, request_id: str) -> SampleRequestRow | None:
    """One request of a fleet."""
    found = session.get(SampleRequestRow, request_id)
    return found if found is not None and found.fleet_id == fleet_id else None


def requests_page(
    session: Session, fleet_id: str, page: PageRequest, *, model: str | None, state: str | None
) -> Rows[SampleRequestRow]:
    """A page of requests."""
    query = select(SampleRequestRow).where(SampleRequestRow.fleet_id == fleet_id)
    if model is not None:
        query = query.where(SampleRequestRow.model == model)
    if state is not None:
        query = query.where(SampleRequestRow.state == state)
    return REQUESTS.scalars(session, query, page)


def uploads(session: Session, request_id: str) -> Sequence[SampleUpload]:
    """A request's uploads, in the order of their devices."""
    query = select(SampleUpload).where(SampleUpload.request_id == request_id).order_by(SampleUpload.device_id)
    return session.scalars(query).all()


def told_to(session: Session, device_ids: Collection[str]) -> Sequence[SampleUpload]:
    """What devices are asked for now, locked until the transaction ends."""
    query = select(SampleUpload).where(SampleUpload.told.is_(True)).order_by(SampleUpload.id).with_for_update()
    return list(scalars_by(session, query, SampleUpload.device_id, sorted(device_ids)))


def sample_set(session: Session, fleet_id: str, set_id: str) -> tuple[SampleUpload, SampleRequestRow] | None:
    """Samples of a fleet that are here, with the request that they answer."""
    upload = session.get(SampleUpload, set_id)
    if upload is None or upload.fleet_id != fleet_id or upload.phase != STORED:
        return None
    return upload, session.get_one(SampleRequestRow, upload.request_id)


def sets_page(
    session: Session, fleet_id: str, page: PageRequest, *, model: str | None, device: str | None
) -> Rows[tuple[SampleUpload, SampleRequestRow]]:
    """A page of samples that are here."""
    query = (
        select(SampleUpload, SampleRequestRow)
        .join(SampleRequestRow, SampleRequestRow.id == SampleUpload.request_id)
        .where(SampleUpload.fleet_id == fleet_id, SampleUpload.phase == STORED)
    )
    if model is not None:
        query = query.where(SampleRequestRow.model == model)
    if device is not None:
        query = query.where(SampleUpload.device_id == device)
    return SETS.rows(session, query, page)


def pieces_of(session: Session, upload_id: str) -> Iterator[bytes]:
    """The pieces of an upload, in order, one at a time."""
    mine = SamplePieceRow.upload_id == upload_id
    for offset in session.scalars(select(SamplePieceRow.offset).where(mine).order_by(SamplePieceRow.offset)).all():
        yield session.scalars(select(SamplePieceRow.data).where(mine, SamplePieceRow.offset == offset)).one()


def forget_pieces(session: Session, upload_id: str) -> None:
    """Remove what has come of an upload."""
    session.execute(delete(SamplePieceRow).where(SamplePieceRow.upload_id == upload_id))


def overdue(session: Session, now: dt.datetime) -> Sequence[SampleRequestRow]:
    """Requests whose time is over, and that are not, or whose devices are still told of them."""
    told = select(SampleUpload.id).where(SampleUpload.request_id == SampleRequestRow.id, SampleUpload.told.is_(True))
    query = select(SampleRequestRow).where(
        SampleRequestRow.deadline_at < now, (SampleRequestRow.state == RequestState.RUNNING.value) | told.exists()
    )
    return session.scalars(query.with_for_update(skip_locked=True)).all()


def stored_before(session: Session, before: dt.datetime, limit: int) -> Sequence[SampleUpload]:
    """Samples that came before a time."""
    query = select(SampleUpload).where(SampleUpload.phase == STORED, SampleUpload.stored_at < before)
    return session.scalars(query.limit(limit).with_for_update(skip_locked=True)).all()


def is_shared(session: Session, upload: SampleUpload) -> bool:
    """Whether the same bytes are another upload's too."""
    query = select(SampleUpload.id).where(
        SampleUpload.digest == upload.digest, SampleUpload.id != upload.id, SampleUpload.phase == STORED
    )
    return session.scalar(query.limit(1)) is not None
