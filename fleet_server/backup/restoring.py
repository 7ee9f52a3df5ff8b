"""Makes a server out of a backup, where there is none: nothing that is there is overwritten, all of it is verified."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import MetaData, create_engine, inspect
from sqlalchemy.engine import make_url

from fleet_server import migrations
from fleet_server.access.bootstrap import FILE as ADMIN_TOKEN
from fleet_server.backup.contents import ARTIFACTS, CA_FILES, DATABASE, SECRETS, Index, read_index
from fleet_server.backup.moving_on import move_on
from fleet_server.backup.tables import clear, copy_rows, count_rows
from fleet_server.catalog.artifacts import ArtifactStore, file_digest
from fleet_server.db import Database
from fleet_server.errors import ConflictError, InvalidError, UnavailableError
from fleet_server.settings import Settings
from fleet_server.trust.ca import write_private

Say = Callable[[str], None]


@dataclass(frozen=True)
class Restored:
    """What came of it.

    Attributes:
        index: of the backup.
        missing: artifacts that are not there, nor were they when the backup was made.
        offline: fleets whose root keys are not in the backup: their operators must rotate `snapshot` and `timestamp`.
    """

    index: Index
    missing: list[str] = field(default_factory=list)
    offline: list[str] = field(default_factory=list)


def restore(settings: Settings, folder: Path, say: Say = lambda _text: None) -> Restored:
    """Restore a backup into the places that settings name.

    Args:
        settings: of the server that is to be; it does not run.
        folder: of one backup.
        say: told what is being done.

    Raises:
        InvalidError: when the backup is damaged, or of a version that this one does not know.
        ConflictError: naming what is there already.
        UnavailableError: when something can't be written.
    """
    index = read_index(folder)
    say("verifying")
    lost = _verify(folder, index)
    _refuse_what_is_there(settings)
    written: list[Path] = []
    try:
        say("artifacts")
        store = ArtifactStore.open(settings.artifacts_url, folder=settings.state_dir / "artifacts")
        _restore_artifacts(store, folder.parent / ARTIFACTS, index)
        say("secrets")
        _restore_secrets(settings, folder / SECRETS, written)
        say("rows")
        offline = _restore_rows(settings, folder / DATABASE, index)
    except BaseException as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UnavailableError("restore", f"{error.filename} can't be written ({error.strerror})") from None
        raise
    return Restored(index, sorted({*index.missing, *lost}), offline)


def _verify(folder: Path, index: Index) -> list[str]:
    """Every byte of it; returns artifacts that are not there."""
    known = migrations.revisions()
    if index.revision not in known:
        detail = f"the backup is of version {index.version}, revision {index.revision}: restore it with that, or later"
        raise InvalidError("other_version", detail)
    for name, digest in index.files.items():
        path = folder / name
        if not path.is_file() or file_digest(path)[0] != digest:
            raise InvalidError("bad_backup", f"{path} is not as it was when the backup was made: take another backup")
    lost = []
    for name in index.artifacts:
        path = folder.parent / ARTIFACTS / name
        if not path.is_file() or file_digest(path)[0] != path.name:
            lost.append(name)
    if lost:
        shown = ", ".join(lost[:5])
        detail = f"{len(lost)} artifacts of the backup are missing or damaged in {folder.parent / ARTIFACTS}: {shown}"
        raise InvalidError("bad_backup", detail)
    return lost


def _refuse_what_is_there(settings: Settings) -> None:
    url = make_url(settings.effective_database_url)
    there = []
    if url.get_backend_name() == "sqlite":
        if url.database and Path(url.database).exists():
            there.append(f"the database {url.database}")
    else:
        engine = create_engine(url)
        try:
            if inspect(engine).get_table_names():
                there.append(f"tables in the database {url.database}")
        finally:
            engine.dispose()
    keys = settings.effective_trust_keys
    own = settings.state_dir / "ca"
    ca = (settings.ca_cert or own / CA_FILES[0], settings.ca_key or own / CA_FILES[1])
    there += [str(one) for one in (*ca, settings.state_dir / ADMIN_TOKEN) if one.exists()]
    if keys.is_dir() and any(keys.rglob("*.key.pem")):
        there.append(f"keys in {keys}")
    if there:
        detail = f"{', '.join(there)}: a backup is restored into an empty place alone; move these away, or name another"
        raise ConflictError("not_empty", detail)


def _restore_artifacts(store: ArtifactStore, folder: Path, index: Index) -> None:
    for name in index.artifacts:
        below, _, _ = name.rpartition("/")
        part = below.rpartition("/")[0]
        (store.below(part) if part else store).put_file(folder / name)


def _restore_secrets(settings: Settings, folder: Path, written: list[Path]) -> None:
    own = settings.state_dir / "ca"
    places = {
        Path("ca") / CA_FILES[0]: settings.ca_cert or own / CA_FILES[0],
        Path("ca") / CA_FILES[1]: settings.ca_key or own / CA_FILES[1],
        Path(ADMIN_TOKEN): settings.state_dir / ADMIN_TOKEN,
    }
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        name = path.relative_to(folder)
        target = places.get(name) or settings.effective_trust_keys / name.relative_to("trust")
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        written.append(target)
        write_private(target, path.read_text())


def _restore_rows(settings: Settings, copy: Path, index: Index) -> list[str]:
    """All rows or none; returns fleets whose operators have to do something."""
    url = settings.effective_database_url
    if make_url(url).get_backend_name() != "sqlite":
        return _into(url, copy, index, settings)
    target = Path(make_url(url).database or "")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copyfile(copy, draft)
        draft.chmod(0o600)
        offline = _checked_and_moved_on(f"sqlite:///{draft}", index, settings)
        draft.replace(target)
    finally:
        for left in target.parent.glob(f"{draft.name}*"):
            left.unlink()
    return offline


def _into(url: str, copy: Path, index: Index, settings: Settings) -> list[str]:
    """Into a database that has no table; they go again when it fails."""
    source, database = create_engine(f"sqlite:///{copy}"), Database(url)
    try:
        migrations.upgrade(url, index.revision)
        with source.connect() as connection, database.write() as session:
            clear(session.connection())
            copy_rows(connection, session.connection())
        return _checked_and_moved_on(url, index, settings)
    except BaseException:
        made = MetaData()
        made.reflect(database.engine)
        made.drop_all(database.engine)
        raise
    finally:
        source.dispose()
        database.dispose()


def _checked_and_moved_on(url: str, index: Index, settings: Settings) -> list[str]:
    database = Database(url)
    try:
        with database.read() as session:
            rows = count_rows(session.connection())
        if rows != index.rows:
            wrong = sorted(name for name in {*rows, *index.rows} if rows.get(name) != index.rows.get(name))
            raise InvalidError(
                "bad_backup", f"other rows than the backup says, in {', '.join(wrong)}: take another one"
            )
        migrations.upgrade(url)
        with database.write() as session:
            return move_on(session, settings, index)
    finally:
        database.dispose()
