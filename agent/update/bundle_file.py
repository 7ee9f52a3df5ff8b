"""Bundles on a disk or a stick: found, opened, and read from. Whatever they hold, only bounded reads and plain files.

A stick may hang or go: the folder is looked through in a thread, and artifacts are read in that of a transfer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.protocol.bundle import BLOCK, INDEX, INDEX_BYTES, SUFFIX, BundleIndex, padding, read_header, read_index
from agent.protocol.errors import WireError
from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Content
from agent.protocol.messages import ChunkRange, TrustPiece
from agent.update.transfer import SourceError, Stop

log = logging.getLogger("agent.bundles")
LOOK_S = 5.0
BUNDLES = 16  # in all folders together
LISTED = 1000  # names of a folder that are looked at


class BundleError(Exception):
    """A file is no bundle, or can't be read."""


@dataclass(frozen=True)
class Extent:
    """Where bytes lie in a file."""

    offset: int
    size: int


@dataclass(frozen=True)
class Held:
    """Where a whole artifact lies: bytes of a file."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class Bundle:
    """A bundle that was looked through; nothing of it has been verified.

    Attributes:
        path: of the file.
        seen: tells this file from another under its name: inode, size, time of change.
        index: what it says it holds.
        metadata: by file name.
        artifacts: those that are there, by digest.
    """

    path: Path
    seen: tuple[int, ...]
    index: BundleIndex
    metadata: dict[str, Extent]
    artifacts: dict[str, Extent]

    def piece(self, file: str, offset: int) -> TrustPiece:
        """A piece of a metadata file, as the fleet server would send it.

        Raises:
            BundleError: when the file can't be read any more.
        """
        extent = self.metadata.get(file)
        if extent is None or not 0 <= offset < extent.size:
            return TrustPiece(file, offset, absent=True)
        count = min(LIMITS.trust_piece_bytes, extent.size - offset)
        with opened(self.path) as (descriptor, _):
            data = _read(descriptor, extent.offset + offset, count)
        if len(data) != count:
            raise BundleError(f"{self.path}: {file} is cut off")
        return TrustPiece(file, offset, extent.size, data)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A plain file, opened for reading: never a link, a pipe or a device.

    Raises:
        BundleError: when it is none, or the medium fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{path} is no plain file")
        yield descriptor, found
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def open_bundle(path: Path) -> Bundle:
    """Look a bundle through: its index, and where what lies.

    Raises:
        BundleError: when it is none.
    """
    with opened(path) as (descriptor, found):
        try:
            return _look_through(path, descriptor, found)
        except WireError as error:
            raise BundleError(f"{path} is no usable bundle: {error.detail}") from None


def _look_through(path: Path, descriptor: int, found: os.stat_result) -> Bundle:
    members = _members(path, descriptor, found.st_size)
    name, extent = next(members, ("", Extent(0, 0)))
    if name != INDEX or extent.size > INDEX_BYTES:
        raise BundleError(f"{path} does not begin with {INDEX}")
    index = read_index(_read(descriptor, extent.offset, extent.size))
    metadata: dict[str, Extent] = {}
    for number, file in enumerate(index.metadata):
        name, extent = next(members, ("", Extent(0, 0)))
        if (name, extent.size) != (f"metadata/{number}", file.size):
            raise BundleError(f"{path} lacks {file.file}")
        metadata[file.file] = extent
    sizes = {f"artifacts/{one.digest}": one for one in index.artifacts}
    artifacts: dict[str, Extent] = {}
    for name, extent in members:
        known = sizes.pop(name, None)
        if known is None or known.size != extent.size:
            raise BundleError(f"{path} holds {name[:80]!r}, which its index does not")
        artifacts[known.digest] = extent
    return Bundle(path, _seen(found), index, metadata, artifacts)


def _members(path: Path, descriptor: int, size: int) -> Iterator[tuple[str, Extent]]:
    offset = 0
    while True:
        header = read_header(_read(descriptor, offset, BLOCK))
        if header is None:
            return
        name, length = header
        offset += BLOCK
        if offset + length > size:
            raise BundleError(f"{path} is cut off in {name[:80]!r}")
        yield name, Extent(offset, length)
        offset += length + padding(length)


def _read(descriptor: int, offset: int, count: int) -> bytes:
    kept = bytearray()
    while len(kept) < count:
        piece = os.pread(descriptor, count - len(kept), offset + len(kept))
        if not piece:
            break
        kept += piece
    return bytes(kept)


def _seen(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_chunks(
    bundle: Bundle, content: Content, spans: Sequence[ChunkRange], stop: Stop
) -> Iterator[tuple[int, bytes]]:
    """Chunks of an artifact in a bundle; runs in a transfer's thread.

    Raises:
        SourceError: when it is not there, or can't be read.
    """
    extent = bundle.artifacts.get(content.digest)
    if extent is None or extent.size != content.size:
        raise SourceError(f"{bundle.path} does not hold it", absent=True)
    try:
        with opened(bundle.path) as (descriptor, found):
            if _seen(found) != bundle.seen:
                raise SourceError(f"{bundle.path} was changed", absent=True)
            for chunk in (one for span in spans for one in range(span.first, span.last + 1)):
                start = chunk * content.chunk_size
                count = min(content.chunk_size, content.size - start)
                data = _read(descriptor, extent.offset + start, count)
                if stop.is_set or len(data) != count:
                    raise SourceError(f"{bundle.path} ended in the middle")
                yield chunk, data
    except BundleError as error:
        raise SourceError(str(error)) from None


@dataclass(frozen=True)
class BundlesSeen:
    """The bundles that are there now; said whenever there are others than before."""

    bundles: tuple[Bundle, ...]


class BundleWatch:
    """Looks through folders, and the folders right below them, again and again, in a thread.

    Args:
        folders: where bundles may appear.
        put: takes what is there; called from the thread.
    """

    def __init__(self, folders: Sequence[Path], put: Callable[[BundlesSeen], None]) -> None:
        self._folders = folders
        self._put = put
        self._known: dict[Path, Bundle] = {}
        self._refused: dict[Path, tuple[int, ...]] = {}
        self._stopping = threading.Event()

    def start(self) -> None:
        """Look from now on."""
        threading.Thread(target=self._run, name="bundles", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.look()
            except Exception:
                log.exception("the folders of bundles could not be looked through")
            self._stopping.wait(LOOK_S)

    def look(self) -> None:
        """Look once, and say what is there when that has changed."""
        found: dict[Path, Bundle] = {}
        for path in self._paths():
            bundle = self._bundle(path)
            if bundle is not None:
                found[path] = bundle
        if found != self._known:
            self._known = found
            self._put(BundlesSeen(tuple(found.values())))

    def _bundle(self, path: Path) -> Bundle | None:
        known = self._known.get(path)
        try:
            with opened(path) as (_, now):
                seen = _seen(now)
            if known is not None and known.seen == seen:
                return known
            if self._refused.get(path) == seen:
                return None
            bundle = open_bundle(path)
        except BundleError as error:
            if self._refused.get(path) is None:
                log.warning("%s", error)
            if len(self._refused) > BUNDLES:
                self._refused.clear()
            with contextlib.suppress(OSError):
                self._refused[path] = _seen(path.lstat())
            return None
        self._refused.pop(path, None)
        log.info("%s holds %d artifacts of fleet %s", path, len(bundle.artifacts), bundle.index.fleet)
        return bundle

    def _paths(self) -> list[Path]:
        found: list[Path] = []
        for folder in self._folders:
            places = [folder, *(one for one in _listed(folder) if not one.is_symlink() and one.is_dir())]
            found += [one for place in places for one in _listed(place) if one.name.endswith(SUFFIX)]
        return sorted(found)[:BUNDLES]


def _listed(folder: Path) -> list[Path]:
    """What lies in a folder; nothing when it is not there, or a medium fails."""
    try:
        with os.scandir(folder) as entries:
            return [folder / entry.name for _, entry in zip(range(LISTED), entries, strict=False)]
    except OSError:
        return []
