"""Makes a backup while servers run: rows at one moment, then the artifacts that they speak of, then secrets."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
from sqlalchemy import create_engine, select
from sqlalchemy.engine import make_url

from agent import __version__
from fleet_server import migrations
from fleet_server.access.bootstrap import FILE as ADMIN_TOKEN
from fleet_server.backup.contents import ARTIFACTS, CA_FILES, DATABASE, FORMAT, INDEX, SECRETS, Index
from fleet_server.backup.tables import clear, copy_rows, count_rows, revision_of
from fleet_server.catalog.artifacts import ArtifactStore, file_digest
from fleet_server.clock import utc_now
from fleet_server.db import Database
from fleet_server.errors import InvalidError, UnavailableError
from fleet_server.models import ArtifactEncoding, Blob, CandidateArtifact, SampleUpload
from fleet_server.samples.schemas import SAMPLES_FOLDER
from fleet_server.settings import Settings

Say = Callable[[str], None]


def make(settings: Settings, out: Path, say: Say = lambda _text: None) -> tuple[Path, Index]:
    """A backup in a new folder below `out`.

    Args:
        settings: of the server, as it runs with them.
        out: of all backups; artifacts that are there already are not copied again.
        say: told what is being done.

    Returns:
        Its folder, and what it says of itself.

    Raises:
        InvalidError: when the database is of another version than this program.
        UnavailableError: when something can't be read or written.
    """
    at = utc_now()
    folder = out / f"{at:%Y%m%dT%H%M%SZ}"
    try:
        folder.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise UnavailableError("backup", f"--out: {folder} can't be made ({error.strerror})") from None
    try:
        index = _made(settings, out, folder, at.isoformat(), say)
        _write(folder / INDEX, msgspec.json.format(msgspec.json.encode(index), indent=2))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UnavailableError("backup", f"{error.filename or folder} can't be used ({error.strerror})") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder, index


def _made(settings: Settings, out: Path, folder: Path, at: str, say: Say) -> Index:
    url = settings.effective_database_url
    say("rows")
    copy = folder / DATABASE
    copy.touch(mode=0o600)
    revision = _copy_sqlite(url, copy) if make_url(url).get_backend_name() == "sqlite" else _copy_others(url, copy)
    engine = create_engine(f"sqlite:///{copy}")
    try:
        with engine.connect() as connection:
            rows = count_rows(connection)
            wanted = _referred(connection)
    finally:
        engine.dispose()
    say("artifacts")
    store = ArtifactStore.open(settings.artifacts_url, folder=settings.state_dir / "artifacts")
    artifacts, missing = _copy_artifacts(store, wanted, out / ARTIFACTS)
    say("secrets")
    _copy_secrets(settings, folder / SECRETS)
    files = {str(one.relative_to(folder)): _sha256(one) for one in sorted(folder.rglob("*")) if one.is_file()}
    came_from = make_url(url).get_backend_name()
    return Index(FORMAT, at, __version__, revision, came_from, rows, files, artifacts, tuple(missing))


def _copy_sqlite(url: str, copy: Path) -> str:
    """By SQLite's own backup: one read transaction, which keeps no writer waiting."""
    path = make_url(url).database
    if not path or not Path(path).exists():
        raise UnavailableError("database", f"there is no database {path}: see SHOAL_STATE_DIR and SHOAL_DATABASE_URL")
    source, target = sqlite3.connect(f"file:{path}?mode=ro", uri=True), sqlite3.connect(copy)
    try:
        source.backup(target)
        target.execute("PRAGMA journal_mode=DELETE")  # one file, whatever the source is
    finally:
        source.close()
        target.close()
    engine = create_engine(f"sqlite:///{copy}")
    try:
        with engine.connect() as connection:
            return _checked(revision_of(connection))
    finally:
        engine.dispose()


def _copy_others(url: str, copy: Path) -> str:
    """By one transaction that sees the database as it was when it began."""
    source = create_engine(url, isolation_level="REPEATABLE READ")
    try:
        with source.connect() as connection:
            revision = _checked(revision_of(connection))
            migrations.upgrade(f"sqlite:///{copy}", revision)
            target = Database(f"sqlite:///{copy}")
            try:
                with target.write() as session:
                    clear(session.connection())
                    copy_rows(connection, session.connection())
            finally:
                target.dispose()
    finally:
        source.dispose()
    with sqlite3.connect(copy) as last:
        last.execute("PRAGMA journal_mode=DELETE")
    last.close()
    return revision


def _checked(revision: str | None) -> str:
    if revision != migrations.head():
        detail = (
            f"the database is of revision {revision}, and this program of {migrations.head()}: use the one that runs"
        )
        raise InvalidError("other_version", detail)
    return revision


def _referred(connection: object) -> dict[str, tuple[str, str]]:
    """What rows speak of: paths in the shared folder, each with the part of the store and the digest."""
    own = [select(Blob.digest), select(CandidateArtifact.digest), select(ArtifactEncoding.digest)]
    found = {}
    for below, queries in (
        ("", own),
        (f"{SAMPLES_FOLDER}/", [select(SampleUpload.digest).where(SampleUpload.phase == "stored")]),
    ):
        for query in queries:
            for digest in connection.scalars(query):  # type: ignore[attr-defined]
                if digest:
                    found[f"{below}{digest[:2]}/{digest}"] = (below.rstrip("/"), digest)
    return found


def _copy_artifacts(
    store: ArtifactStore, wanted: dict[str, tuple[str, str]], folder: Path
) -> tuple[dict[str, int], list[str]]:
    sizes, missing = {}, []
    for path, (below, digest) in sorted(wanted.items()):
        part = store.below(below) if below else store
        target = folder / path
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = target.with_name(f".{digest}.{os.getpid()}")
            try:
                part.fetch_to(digest, draft)
            except UnavailableError as error:
                draft.unlink(missing_ok=True)
                if error.code not in {"artifact_missing", "artifact_damaged"}:
                    raise
                missing.append(path)
                continue
            draft.replace(target)
        sizes[path] = target.stat().st_size
    return sizes, missing


def _copy_secrets(settings: Settings, folder: Path) -> None:
    """The CA, the keys that this server signs with, and the admin's token: what makes the fleet this fleet."""
    folder.mkdir(mode=0o700)
    own = settings.state_dir / "ca"
    ca = (settings.ca_cert or own / CA_FILES[0], settings.ca_key or own / CA_FILES[1])
    for path, name in zip(ca, CA_FILES, strict=True):
        if path.exists():
            _write(folder / "ca" / name, path.read_bytes())
    keys = settings.effective_trust_keys
    for path in sorted(keys.rglob("*.key.pem")) if keys.is_dir() else []:
        _write(folder / "trust" / path.relative_to(keys), path.read_bytes())
    for one in folder.rglob("*/"):
        one.chmod(0o700)
    token = settings.state_dir / ADMIN_TOKEN
    if settings.admin_token is None and token.exists():
        _write(folder / ADMIN_TOKEN, token.read_bytes())


def _write(path: Path, content: bytes) -> None:
    """A file that only its owner may read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    return file_digest(path)[0]
