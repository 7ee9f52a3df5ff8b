"""Backups of a database that is written to, restored on either kind: whole, verified, into empty places alone."""

from __future__ import annotations

import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from agent.protocol.bundle import read_order
from fleet_server import migrations
from fleet_server.backup.making import make
from fleet_server.backup.moving_on import BEYOND
from fleet_server.backup.restoring import restore
from fleet_server.backup.tables import count_rows
from fleet_server.catalog.artifacts import ArtifactStore
from fleet_server.db import Database
from fleet_server.errors import ConflictError, InvalidError
from fleet_server.models import AuditEvent, Blob, Device, Fleet, Lease, OutboxMessage, TelemetryGroup, TrustTarget
from fleet_server.principals import DEFAULT_FLEET
from fleet_server.settings import Settings
from fleet_server.trust import service as trust
from fleet_server.trust.ca import FleetCa
from tests.databases import short_on_sqlite
from tests.integration.test_database_rules import register
from tests.integration.test_trust_repository import Repository
from tests.rows import insert_one_each
from tests.unit.agent.test_updater import manifest


class Source:
    """A server's places, with something in each."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.folder, self.database = folder, database
        self.settings = Settings(state_dir=folder / "server", database_url=database.url)
        self.repository = Repository(database, folder)
        FleetCa.open(self.settings.state_dir / "ca", DEFAULT_FLEET)
        (self.settings.state_dir / "admin-token").write_text("shoal_admin_x\n")
        self.store = ArtifactStore.open(None, folder=self.settings.state_dir / "artifacts")
        self.digests = [self.upload(f"content {number}".encode()) for number in range(3)]
        register(database, "dev-1")
        with database.write() as session:
            session.get_one(Device, "dev-1").desired_revision = 7
            session.add(
                Lease(name="x", fleet_id=DEFAULT_FLEET, owner="y", until=session.get_one(Device, "dev-1").created_at)
            )
            session.add(OutboxMessage(fleet_id=DEFAULT_FLEET, topic="t", payload=b"old", retain=False))

    def upload(self, content: bytes) -> str:
        path = self.folder / "upload"
        path.write_bytes(content)
        digest, size = self.store.put_file(path)
        with self.database.write() as session:
            session.add(Blob(fleet_id=DEFAULT_FLEET, digest=digest, size=size))
        return digest


@pytest.fixture
def source(database: Database, tmp_path: Path) -> Source:
    return Source(database, tmp_path)


@pytest.fixture
def plain(tmp_path: Path) -> Settings:
    """Places with nothing in them, for SQLite."""
    return Settings(state_dir=tmp_path / "restored")


@pytest.fixture
def empty(database: Database, plain: Settings, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Places with nothing in them, for the other kind of database."""
    if not database.is_sqlite:
        yield plain
        return
    server = create_engine(request.getfixturevalue("postgresql_url"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text("CREATE DATABASE restored"))
    url = server.url.set(database="restored").render_as_string(hide_password=False)
    yield Settings(state_dir=tmp_path / "restored", database_url=url)
    with server.connect() as connection:
        connection.execute(text("DROP DATABASE restored WITH (FORCE)"))
    server.dispose()


def test_what_was_backed_up_is_restored_and_goes_past_what_devices_saw(source: Source, empty: Settings) -> None:
    source.repository.want(manifest("a", version="1"))
    with source.database.write() as session:
        trust.want_order(session, DEFAULT_FLEET, "stick", ["m/1/v.json"], 5.0)
        trust.advance(session, source.settings, DEFAULT_FLEET)
    device = source.repository.device()
    device.refresh()
    folder, index = make(source.settings, source.folder / "out")
    assert index.rows["devices"] == 1
    # What a device saw after the backup: another model's role, and later versions of everything.
    source.repository.want(manifest("c", model="other", version="2"))
    source.repository.want(manifest("d", version="3"))
    device = source.repository.device()
    device.refresh()
    done = restore(empty, folder)
    assert (done.missing, done.offline) == ([], [])
    restored = Database(empty.effective_database_url)
    with restored.read() as session:
        found = session.get_one(Device, "dev-1")
        assert (found.desired_revision, found.online, found.boot_id) == (7 + BEYOND, False, None)
        assert session.query(Lease).count() == session.query(OutboxMessage).count() == 0
        (order,) = session.query(TrustTarget).filter_by(role="bundles")
        assert read_order(order.manifest).serial == 1 + BEYOND
        assert session.query(AuditEvent).filter_by(action="server.restore").count() == 1
        assert {one.digest for one in session.query(Blob)} == set(source.digests)
    store = ArtifactStore.open(None, folder=empty.state_dir / "artifacts")
    assert all(store.exists(one) for one in source.digests)
    # The same device believes the restored server, though its metadata have lower versions and lack a role.
    source.repository.database, source.repository.settings = restored, empty
    source.repository.check(manifest("a", version="1"))
    source.repository.want(manifest("e", version="4"))
    source.repository.check(manifest("e", version="4"))
    secrets = ("admin-token", "ca/ca.pem", "ca/ca.key")
    for name in secrets:
        assert (empty.state_dir / name).read_bytes() == (source.settings.state_dir / name).read_bytes()
        assert stat.S_IMODE((empty.state_dir / name).stat().st_mode) == 0o600
    restored.dispose()


def test_every_table_goes_through_a_backup(database: Database, tmp_path: Path, empty: Settings) -> None:
    with database.write() as session:
        session.query(Fleet).delete()
        names = insert_one_each(session.connection(), Fleet.metadata)
        session.query(Blob).delete()
        session.query(TrustTarget).delete()
        before = count_rows(session.connection())
        for name in ("trust_metadata", "artifact_encodings", "encodings", "candidate_artifacts"):
            if name in names:
                session.execute(text(f"DELETE FROM {name}"))
    settings = Settings(state_dir=tmp_path / "server", database_url=database.url)
    settings.state_dir.mkdir()
    folder, index = make(settings, tmp_path / "out")
    done = restore(empty, folder)
    assert done.index.rows == index.rows
    assert sum(index.rows.values()) > len(before) - 10
    restored = Database(empty.effective_database_url)
    with restored.read() as session:
        after = count_rows(session.connection())
    forgotten = {"leases", "servers", "device_shards", "outbox", "idempotency_keys", "audit_events"}
    assert {name: after[name] for name in after if name not in forgotten} == {
        name: index.rows[name] for name in index.rows if name not in forgotten
    }
    # Numbers that the database gives go on after those that were restored.
    with restored.write() as session:
        session.add(TelemetryGroup(fleet_id=session.query(Fleet).first().id))  # type: ignore[union-attr]
    restored.dispose()


def test_a_backup_is_of_one_moment_while_others_write(source: Source) -> None:
    """Each transaction adds two rows: a backup has both or none."""
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            with source.database.write() as session:
                for part in "ab":
                    session.add(Fleet(id=f"f{number}{part}"))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(2):
            _, index = make(source.settings, source.folder / f"out-{number}")
            assert index.rows["fleets"] % 2 == 1, "the default one, and pairs"
    finally:
        over.set()
        thread.join()


@short_on_sqlite("database")
def test_artifacts_are_copied_once_and_what_is_missing_is_named(source: Source) -> None:
    out = source.folder / "out"
    first, index = make(source.settings, out)
    assert len(index.artifacts) == 3
    kept = out / "artifacts" / source.digests[0][:2] / source.digests[0]
    written_at = kept.stat().st_mtime_ns
    gone = source.upload(b"gone")
    source.store.delete(gone)
    first.rename(out / "earlier")
    _, index = make(source.settings, out)
    assert index.missing == (f"{gone[:2]}/{gone}",)
    assert kept.stat().st_mtime_ns == written_at
    for path in (out / "earlier").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@short_on_sqlite("database")
def test_nothing_that_is_there_is_overwritten(source: Source) -> None:
    folder, _ = make(source.settings, source.folder / "out")
    with pytest.raises(ConflictError, match=r"ca\.key.*into an empty place alone"):
        restore(source.settings, folder)


@short_on_sqlite("database")
def test_a_damaged_backup_is_refused_and_leaves_nothing(source: Source, plain: Settings) -> None:
    folder, _ = make(source.settings, source.folder / "out")
    for name in ("database.sqlite", "secrets/ca/ca.key"):
        damaged = source.folder / "damaged" / folder.name
        shutil.copytree(folder, damaged)
        shutil.copytree(folder.parent / "artifacts", damaged.parent / "artifacts")
        with (damaged / name).open("ab") as file:
            file.write(b"x")
        with pytest.raises(InvalidError, match="is not as it was"):
            restore(plain, damaged)
        shutil.rmtree(damaged.parent)
    artifact = folder.parent / "artifacts" / source.digests[0][:2] / source.digests[0]
    artifact.write_bytes(b"other")
    with pytest.raises(InvalidError, match="1 artifacts of the backup are missing or damaged"):
        restore(plain, folder)
    assert not plain.state_dir.exists()
    (folder / "backup.json").write_text("{}")
    with pytest.raises(InvalidError, match="is no backup"):
        restore(plain, folder)


@short_on_sqlite("database")
def test_a_backup_of_a_later_release_is_refused(
    source: Source, plain: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make(source.settings, source.folder / "out")
    monkeypatch.setattr(migrations, "revisions", lambda: ["0001"])
    with pytest.raises(InvalidError, match="restore it with that, or later"):
        restore(plain, folder)


@short_on_sqlite("database")
def test_without_the_root_keys_its_operator_is_told(source: Source, plain: Settings) -> None:
    folder = trust.key_folder(source.settings, DEFAULT_FLEET)
    with source.database.read() as session:
        found = trust.state(session, DEFAULT_FLEET)
    assert found is not None
    for keyid in found.root.signed.roles["root"].keyids:
        folder.remove(keyid)
    backup, _ = make(source.settings, source.folder / "out")
    assert restore(plain, backup).offline == [DEFAULT_FLEET]
