"""The releases of a device on its disk, and the pointers by which `agent.launcher` finds them.

Every change is made beside what it replaces, synced, and renamed: a power cut at any point leaves the old or the new.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.files import remove_durably, remove_leftovers, sync_folder, write_durably
from agent.launcher import INSTALLED, pointer, runs
from agent.protocol.release import INFO, SITE, ReleaseInfo

MOST_FILES = 20_000
PIECE = 1 << 20


class BundleError(Exception):
    """A bundle can't be unpacked; the message says why."""


class Trial(msgspec.Struct):
    """How a version is tried, as the launcher reads it; `starts` is the launcher's to count.

    Attributes:
        deployment_id: that wants it.
        release: what `next` names.
        version: as people call it.
        confirm_s: within how many seconds of a start it must prove itself.
        most_starts: how often it is started at most.
        serving: digests by model, of what was served before: it must serve them too.
        starts: how often it was.
        last: how it ended the last time.
    """

    deployment_id: str
    release: str
    version: str
    confirm_s: float
    most_starts: int
    serving: dict[str, str] = {}
    starts: int = 0
    last: str = ""


@dataclass(frozen=True)
class Failed:
    """How a trial ended badly.

    Attributes:
        reason: in a sentence.
        starts: how often the version was started; 0: never.
    """

    reason: str
    starts: int


class ReleaseFolder:
    """The folder.

    Args:
        path: made when something is to be kept there.
        running: the release that runs this process (`agent.launcher.RELEASE`); empty for what is installed.
    """

    def __init__(self, path: Path, running: str = "") -> None:
        self._path = path
        self._releases = path / "releases"
        self.running = Path(running).name if running else ""
        for one in (path, self._releases):
            if one.is_dir():
                remove_leftovers(one)

    @property
    def current(self) -> str:
        """The digest of what has proved itself last; empty for what is installed."""
        return _digest(pointer(str(self._path), "current"))

    @property
    def trial(self) -> Trial | None:
        """The trial that this process is; None when it is none."""
        which = pointer(str(self._path), "next")
        if which is None or _digest(which) != self.running:
            return None
        try:
            found = msgspec.json.decode((self._path / "trial.json").read_bytes(), type=Trial)
        except (OSError, msgspec.MsgspecError):
            return None
        return found if found.release == which and found.starts else None

    def failed(self, deployment_id: str) -> Failed | None:
        """How a deployment's trial ended badly; None when it did not."""
        try:
            found = json.loads((self._path / "failed.json").read_bytes())[deployment_id]
            return Failed(str(found["reason"])[:1000], int(found["starts"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def has(self, digest: str) -> bool:
        """Whether a release is unpacked here."""
        return runs(str(self._path), f"releases/{digest}")

    def add(self, digest: str, bundle: Path, info: ReleaseInfo) -> None:
        """Unpack a bundle whose digest was checked; nothing where it is here already. Takes seconds.

        Raises:
            BundleError: when it is not what was signed of it.
            OSError: when it can't be written.
        """
        if self.has(digest):
            return
        self._releases.mkdir(parents=True, exist_ok=True)
        part = self._releases / f".{digest}.{os.getpid()}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            _unpack(bundle, part, info)
            part.rename(self._releases / digest)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        sync_folder(self._releases)
        sync_folder(self._path)

    def set_next(self, trial: Trial, installed: str) -> None:
        """Let the launcher try a version at its next start. This is the moment from which it is on trial.

        Args:
            trial: how; `release` is `releases/DIGEST` or `installed`.
            installed: the version of the installed agent.

        Raises:
            OSError: when it can't be written; nothing is tried then.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        write_durably(self._path / INSTALLED, installed.encode())
        write_durably(self._path / "trial.json", msgspec.json.encode(trial))
        self._point("next", trial.release)

    def waits(self, text: str) -> None:
        """Say what the version on trial still waits for: the launcher repeats it where that does not come."""
        with contextlib.suppress(OSError):
            (self._path / "waits").write_text(text)

    def confirm(self) -> None:
        """The version that is on trial has proved itself: one rename makes it what runs.

        Raises:
            OSError: when it can't be; it is on trial still.
        """
        before = pointer(str(self._path), "current")
        if before is not None and before != pointer(str(self._path), "next"):
            self._point("previous", before)
        (self._path / "next").rename(self._path / "current")
        sync_folder(self._path)
        for name in ("trial.json", "waits"):
            with contextlib.suppress(OSError):
                remove_durably(self._path / name)
        shutil.rmtree(self._path / "before", ignore_errors=True)

    def forget(self) -> None:
        """Another agent was installed since, and runs: what the pointers name is over.

        Raises:
            OSError: when they can't be removed.
        """
        for name in ("next", "current", "previous", "trial.json", "waits", INSTALLED):
            if os.path.lexists(self._path / name):
                (self._path / name).unlink()
        if self._path.is_dir():
            sync_folder(self._path)
        shutil.rmtree(self._path / "before", ignore_errors=True)

    def collect(self, keep: set[str]) -> None:
        """Remove releases that no pointer names and nobody else keeps; what can't be removed stays."""
        named = {_digest(pointer(str(self._path), name)) for name in ("current", "next", "previous")}
        kept = keep | named | {self.running}
        with contextlib.suppress(OSError):
            for one in list(self._releases.iterdir()):
                if one.name not in kept and not one.name.startswith(f".{one.name[1:65]}.{os.getpid()}."):
                    shutil.rmtree(one, ignore_errors=True)

    def free(self) -> int:
        """Bytes that the disk has left.

        Raises:
            OSError: when it can't be asked.
        """
        place = self._path if self._path.is_dir() else self._path.parent
        disk = os.statvfs(place)
        return disk.f_bavail * disk.f_frsize

    def _point(self, name: str, target: str) -> None:
        part = self._path / f".{name}.{os.getpid()}.tmp"
        part.unlink(missing_ok=True)
        os.symlink(target, part)  # noqa: PTH211 (of pathlib's it would be no link to a folder for a test's disk)
        part.rename(self._path / name)
        sync_folder(self._path)


def place_of(digest: str) -> str:
    """What a pointer to a release names; of none, what is installed."""
    return f"releases/{digest}" if digest else INSTALLED


def _digest(named: str | None) -> str:
    return "" if named in {None, INSTALLED} else Path(str(named)).name


def _unpack(bundle: Path, folder: Path, info: ReleaseInfo) -> None:
    """Write the files of a bundle and sync them: regular files and folders within it, and no more than it said."""
    left = info.unpacked
    try:
        with tarfile.open(bundle, "r:") as archive:
            for count, member in enumerate(archive):
                left -= member.size
                if count >= MOST_FILES or left < 0:
                    raise BundleError("it holds more than it says")
                target = _target(folder, member)
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _write(archive, member, target)
    except (tarfile.TarError, EOFError) as error:
        raise BundleError(f"it can't be read: {error}") from None
    try:
        said = msgspec.json.decode((folder / INFO).read_bytes(), type=ReleaseInfo)
    except (OSError, msgspec.MsgspecError) as error:
        raise BundleError(f"it has no readable {INFO}: {error}") from None
    if said != info or not (folder / SITE).is_dir():
        raise BundleError(f"its {INFO} is not what was signed of it, or it has no {SITE}")
    for root, _, files in os.walk(folder):  # when all is written: then most of it is on the disk already
        for one in files:
            _sync(Path(root, one))
        sync_folder(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _target(folder: Path, member: tarfile.TarInfo) -> Path:
    parts = member.name.split("/")
    plain = (member.isreg() or member.isdir()) and not member.issparse()
    if not plain or member.name.startswith("/") or any(part in {"", ".", ".."} or "\0" in part for part in parts):
        raise BundleError(f"it holds what no release does: {member.name[:100]!r}")
    return folder.joinpath(*parts)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = archive.extractfile(member)
    assert source is not None  # it is a regular file
    mode = 0o755 if member.mode & 0o100 else 0o644
    with source, os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        shutil.copyfileobj(source, file, PIECE)


def same(serving: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether all that was served is served, by the same bytes; digests by model."""
    return all(serving.get(model) == digest for model, digest in wanted.items())
