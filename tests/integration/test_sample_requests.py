"""Requests for samples on the server: pieces, hostile files, deadlines, retention, rules that follow profiles."""

from __future__ import annotations

import datetime as dt
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.protocol.codec import decode
from agent.protocol.facts import DeviceFacts
from agent.protocol.messages import DesiredState, Reported
from agent.protocol.samples import (
    LISTING,
    SampleLine,
    SamplePiece,
    SamplesReport,
    TensorLine,
    UploadPhase,
    UploadReport,
)
from agent.protocol.version import SPOKEN
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.devices import service as devices
from fleet_server.gateway.reports import Reports
from fleet_server.models import Device, Model, OutboxMessage, Profile, SamplePieceRow, SampleRequestRow, SampleUpload
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.samples import repository, service
from fleet_server.samples.examining import NoSamplesError, examine
from fleet_server.samples.keeper import SampleKeeper
from fleet_server.samples.receiving import Receiving
from fleet_server.samples.schemas import SAMPLES_FOLDER, SampleRequestCreate, SamplingSpec
from fleet_server.settings import Settings
from tests.reporting import record_report

SETTINGS = Settings(samples_days=2.0)
FACTS = DeviceFacts(
    agent_version="1", os="", kernel="", arch="x86_64", cpu_model="", cpu_cores=1, cpu_features=(), memory_mb=1,
    disk_free_mb=1, features=("samples",),
)  # fmt: skip
LINE = SampleLine("m", "1", "a" * 64, 1.0, 0.4, (TensorLine("x", "FP32", (1, 2)),), (TensorLine("y", "FP32", (1,)),))


def archive(path: Path, lines: Any = (LINE,), members: dict[str, bytes] | None = None) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (members or {"0/in/x.npy": b"1" * 300, "0/out/y.npy": b"2"}).items():
            file.writestr(name, content)
        file.writestr(LISTING, msgspec.json.encode(lines))
    return path.read_bytes()


class Server:
    """What a device talks to, without a broker."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.artifacts = ArtifactStore.open(None, folder=folder / "artifacts")
        self.store = self.artifacts.below(SAMPLES_FOLDER)
        self.receiving = Receiving(database, self.store, folder)
        self.sequence = 0
        with database.write() as session:
            session.add(Model(fleet_id=DEFAULT_FLEET, name="m"))
            session.add(Profile(fleet_id=DEFAULT_FLEET, name="p", spec={"match": {}, "runtime": "onnx"}))
            session.flush()
            device = record_report(session, "d", Reported(SPOKEN, "b", 0, 0, FACTS), utc_now()).device
            device.profile_id, device.profile_pinned = session.query(Profile).one().id, True

    def rule(self, **fields: Any) -> None:
        with self.database.write() as session:
            service.set_rule(session, SETTINGS, DEFAULT_FLEET, "m", "p", SamplingSpec(**fields), actor="t")

    def ask(self, **fields: Any) -> str:
        with self.database.write() as session:
            wanted = SampleRequestCreate(model="m", devices=["d"], **fields)
            request = service.ask(session, SETTINGS, DEFAULT_FLEET, wanted, actor="t")
            return repository.uploads(session, request.id)[0].id

    def upload(self, upload_id: str) -> SampleUpload:
        with self.database.read() as session:
            return session.get_one(SampleUpload, upload_id)

    def send(self, upload_id: str, body: bytes, *, size: int = 100, first: int = 0) -> Any:
        digest, ack = hashlib.sha256(body).hexdigest(), None
        for offset in range(first, len(body), size):
            piece = SamplePiece(upload_id, digest, len(body), offset, body[offset : offset + size])
            ack = self.receiving.take("d", piece, utc_now())
        return ack

    def report(self, samples: SamplesReport, *, revision: int | None = None) -> None:
        self.sequence += 1
        with self.database.write() as session:
            device = session.get_one(Device, "d")
            known = device.desired_revision if revision is None else revision
            said = Reported(SPOKEN, "b", self.sequence, known, FACTS, samples=samples)
        Reports(self.database, SETTINGS).take([("d", said)])

    @property
    def desired(self) -> DesiredState:
        with self.database.read() as session:
            newest = session.query(OutboxMessage).order_by(OutboxMessage.id.desc()).first()
            assert newest is not None
            return decode(newest.payload, DesiredState)


@pytest.fixture
def server(database: Database, tmp_path: Path) -> Server:
    return Server(database, tmp_path)


def test_pieces_make_a_file_once_whatever_is_sent_again(server: Server, tmp_path: Path) -> None:
    server.rule()
    upload_id = server.ask()
    assert [one.upload_id for one in server.desired.sample_requests] == [upload_id]
    body = archive(tmp_path / "x.npz")
    digest = hashlib.sha256(body).hexdigest()
    skipped = server.receiving.take("d", SamplePiece(upload_id, digest, len(body), 100, body[100:200]), utc_now())
    assert (skipped.received, skipped.stored) == (0, False)
    for _ in range(2):
        again = server.receiving.take("d", SamplePiece(upload_id, digest, len(body), 0, body[:100]), utc_now())
        assert again.received == 100
    ack = server.send(upload_id, body, first=100)
    assert (ack.received, ack.stored, ack.refused) == (len(body), True, "")
    assert server.send(upload_id, body).stored  # the answer was lost
    found = server.upload(upload_id)
    assert (found.phase, found.samples, found.digest, found.told) == ("stored", 1, digest, True)
    assert server.store.read_range(digest, 0, len(body)) == body
    assert not server.artifacts.exists(digest)
    with server.database.read() as session:
        assert session.query(SamplePieceRow).count() == 0
        assert session.query(SampleRequestRow).one().state == "done"
    server.report(SamplesReport(True, ("m",), uploads=(UploadReport(upload_id, UploadPhase.DONE, 1, len(body)),)))
    assert not server.upload(upload_id).told
    assert server.desired.sample_requests == ()


def test_a_device_that_packs_anew_begins_anew(server: Server, tmp_path: Path) -> None:
    server.rule()
    upload_id = server.ask()
    first = archive(tmp_path / "x.npz")
    server.receiving.take(
        "d", SamplePiece(upload_id, hashlib.sha256(first).hexdigest(), len(first), 0, first[:100]), utc_now()
    )
    other = archive(tmp_path / "y.npz", members={"0/in/x.npy": b"3" * 400, "0/out/y.npy": b"2"})
    assert server.send(upload_id, other).stored
    assert server.upload(upload_id).digest == hashlib.sha256(other).hexdigest()


def test_what_is_no_file_of_samples_is_refused_and_nothing_is_left(server: Server, tmp_path: Path) -> None:
    server.rule()
    bad = {
        "no zip": b"rubbish",
        "another model": archive(tmp_path / "a", (msgspec.structs.replace(LINE, model="other"),)),
        "no line": archive(tmp_path / "b", ()),
        "unlisted": archive(tmp_path / "c", members={"0/in/x.npy": b"", "0/out/y.npy": b"", "evil": b""}),
        "missing": archive(tmp_path / "d", members={"0/in/x.npy": b""}),
    }
    for name, body in bad.items():
        upload_id = server.ask()
        ack = server.send(upload_id, body)
        assert ack.refused, name
        found = server.upload(upload_id)
        assert (found.phase, found.reason, found.told) == ("failed", "refused", False), name
        assert not server.store.exists(hashlib.sha256(body).hexdigest())
    upload_id = server.ask(megabytes=0.01)
    assert "were asked for" in server.send(upload_id, b"x" * 20_000, size=20_000).refused
    lied = archive(tmp_path / "x.npz")
    upload_id = server.ask()
    ack = server.receiving.take("d", SamplePiece(upload_id, "b" * 64, len(lied), 0, lied), utc_now())
    assert "another digest" in ack.refused
    mine = server.ask()
    stranger = server.receiving.take("e", SamplePiece(mine, "b" * 64, 1, 0, b"x"), utc_now())
    unknown = server.receiving.take("d", SamplePiece("unknown", "b" * 64, 1, 0, b"x"), utc_now())
    assert stranger.refused
    assert unknown.refused
    assert server.upload(mine).phase == "pending"
    with server.database.read() as session:
        assert session.query(SamplePieceRow).count() == 0


@given(st.binary(max_size=400))
def test_whatever_the_bytes_only_one_error_comes(content: bytes) -> None:
    path = Path(__file__).with_suffix(".tmp")
    try:
        path.write_bytes(content)
        with pytest.raises(NoSamplesError):
            examine(path, "m")
    finally:
        path.unlink()


def test_what_a_device_can_not_give_is_said(server: Server) -> None:
    off = server.upload(server.ask())
    assert (off.phase, off.reason, off.told) == ("failed", "off", False)
    server.rule()
    with server.database.write() as session:
        device = session.get_one(Device, "d")
        device.facts = {**device.facts, "features": []}
    assert server.upload(server.ask()).reason == "agent_too_old"
    server.report(SamplesReport(True, ("m",)))
    several = [server.ask() for _ in range(9)]
    assert server.upload(several[-1]).reason == "too_many"
    said = UploadReport(several[0], UploadPhase.FAILED, reason="not_allowed", detail="set samples.allow = true")
    none = UploadReport(several[1], UploadPhase.DONE, reason="none_kept", detail="none is kept now")
    server.report(SamplesReport(False, uploads=(said, none)))
    assert [server.upload(one).phase for one in several[:3]] == ["failed", "empty", "pending"]
    assert server.upload(several[0]).detail == "set samples.allow = true"


def test_a_request_ends_in_time_and_samples_are_kept_no_longer_than_is_said(server: Server, tmp_path: Path) -> None:
    server.rule()
    late, stored = server.ask(timeout_s=60), server.ask()
    body = archive(tmp_path / "x.npz")
    digest = hashlib.sha256(body).hexdigest()
    assert server.send(stored, body).stored
    server.receiving.take("d", SamplePiece(late, digest, len(body), 0, body[:100]), utc_now())
    keeper = SampleKeeper(server.database, server.artifacts, SETTINGS)
    keeper.tick(utc_now() + dt.timedelta(seconds=61))
    found = server.upload(late)
    assert (found.phase, found.reason, found.told, found.received) == ("failed", "timeout", False, 0)
    assert server.upload(stored).phase == "stored"
    keeper.tick(utc_now() + dt.timedelta(days=2, seconds=1))
    gone = server.upload(stored)
    assert (gone.phase, gone.listing, gone.told) == ("deleted", None, False)
    assert not server.store.exists(digest)


def test_a_device_is_told_anew_where_it_keeps_what_it_should_not(server: Server) -> None:
    server.rule(samples=7, below=0.5)
    (sampling,) = server.desired.sampling
    assert (sampling.model, sampling.samples, sampling.below) == ("m", 7, 0.5)
    with server.database.write() as session:
        session.get_one(Device, "d").profile_id = None
    before = server.desired.revision
    server.report(SamplesReport(True, ("m",)))
    assert server.desired.sampling == ()
    assert server.desired.revision == before + 1
    server.report(SamplesReport(True, ()))
    server.report(SamplesReport(False, ()))
    assert server.desired.revision == before + 1


def test_a_rule_goes_with_its_profile(server: Server) -> None:
    server.rule()
    with server.database.write() as session:
        devices.delete_profile(session, DEFAULT_FLEET, "p", actor="t")
    with server.database.read() as session:
        assert repository.profiles_of(session, DEFAULT_FLEET, "m") == set()
