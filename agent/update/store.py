"""The artifact store of a device: files by their SHA-256, and downloads that survive a power cut.

A download is a file `{digest}.part` of the final size beside `{digest}.have`: a byte a chunk, and which start of the
machine wrote it. A chunk is `WRITTEN`, which counts until the machine starts anew (a killed agent loses nothing), then
`SYNCED`, which counts after a power cut too, for the mark is written when the data was synced. So a power cut costs the
chunks of the last seconds, not the whole; should a mark say too much all the same, the digest finds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from agent.files import boot_id, remove_durably, remove_leftovers, rename_durably, sync_folder
from agent.protocol.manifest import Content, chunk_count
from agent.protocol.messages import ChunkRange

log = logging.getLogger("agent")
MISSING, WRITTEN, SYNCED = 0, 1, 2
AHEAD_CHUNKS = 16  # are sent to the disk at once, so that the end need not wait for the whole
Bytes = bytes | bytearray | memoryview


class ArtifactStore:
    """Artifacts below a folder.

    Args:
        folder: made where it is not there.
        floor_bytes: what a download must leave free on the disk.
        keep_bytes: how much of what is not needed may stay, if it is of use.

    Attributes:
        drop_other: removes something that others keep on the same disk and that is worth less than any artifact;
            false when there is nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        floor_bytes: int = 0,
        keep_bytes: int = 0,
        drop_other: Callable[[], bool] = lambda: False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._floor_bytes = floor_bytes
        self._keep_bytes = keep_bytes
        self.drop_other = drop_other
        self._spare: list[str] = []
        remove_leftovers(folder)

    def path(self, digest: str) -> Path:
        """Where a verified artifact lies, or would."""
        return self._folder / digest

    def compiled(self, digest: str) -> Path:
        """A folder for what is compiled of an artifact on this device; it goes with the artifact."""
        return self._folder / f"{digest}.compiled"

    def has(self, digest: str) -> bool:
        """Whether an artifact is there, whole."""
        return self.path(digest).is_file()

    def verify(self, digest: str) -> bool:
        """Whether the bytes of an artifact are still those of its name; a damaged one is removed, where that works."""
        path = self.path(digest)
        try:
            if _digest(path) == digest:
                return True
        except FileNotFoundError:
            return False
        except OSError as error:
            log.error("%s can't be read: %s", path, error)  # noqa: TRY400
        with contextlib.suppress(OSError):
            remove_durably(path)
        return False

    def open_part(self, content: Content) -> Part:
        """The download of an artifact, or of a data set, as far as it has come."""
        return Part(self._folder, content)

    def held(self) -> list[str]:
        """Digests of what is there, whole."""
        return sorted(path.name for path in self._folder.iterdir() if "." not in path.name)

    def adopt(self, digest: str, path: Path) -> bool:
        """Give a file that was made here the name of its digest; one of another digest is removed, and false.

        Raises:
            OSError: when it can't be read or renamed.
        """
        if _digest(path) != digest:
            path.unlink()
            return False
        rename_durably(path, self.path(digest))
        return True

    def discard(self, path: Path) -> None:
        """Remove a file that was being made, if there is one."""
        path.unlink(missing_ok=True)

    def collect_garbage(self, keep: Iterable[str], useful: Sequence[str] = ()) -> None:
        """Remove every artifact and download that is not kept. What can't be removed stays until the next time.

        Args:
            keep: digests that are needed.
            useful: digests that may stay as long as they fit into `keep_bytes`, the most useful first.
        """
        kept, room = set(keep), self._keep_bytes
        self._spare = []
        for digest in useful:
            size = 0 if digest in kept else self._size(digest)
            size += self._compiled_size(digest) if size else 0
            if size and size <= room:
                room -= size
                self._spare.append(digest)
        kept.update(self._spare)
        with contextlib.suppress(OSError):
            for path in list(self._folder.iterdir()):
                digest, _, kind = path.name.partition(".")
                finished = kind == "have" and not self.path(f"{digest}.part").exists()
                if digest and (digest not in kept or finished):
                    _remove(path)

    def make_room(self, content: Content, reserved: int = 0) -> int:
        """Let what is only useful go, the least useful first, until a content can come.

        Args:
            content: what is to come; what came of it before is here already.
            reserved: bytes that other downloads still need.

        Returns:
            How many bytes the disk lacks all the same; 0 when it is enough.

        Raises:
            OSError: when the disk can't be asked.
        """
        needed = content.size + reserved + self._floor_bytes - self._size(f"{content.digest}.part")
        while (lacking := needed - self._free()) > 0 and self.drop_spare():
            pass
        return max(lacking, 0)

    def drop_spare(self) -> bool:
        """Remove the least useful of what is not needed: others' first, then artifacts; false when there is none."""
        if self.drop_other():
            return True
        while self._spare:
            path = self.path(self._spare.pop())
            if path.is_file():
                log.warning("the disk is short: %s, which is only kept to go back to, is removed", path.name)
                with contextlib.suppress(OSError):
                    path.unlink()
                    _remove(self.compiled(path.name))
                    return True
        return False

    def _free(self) -> int:
        disk = os.statvfs(self._folder)
        return disk.f_bavail * disk.f_frsize

    def _compiled_size(self, digest: str) -> int:
        """Bytes that what was compiled of an artifact takes on the disk."""
        found: list[Path] = []
        with contextlib.suppress(OSError):  # the worker may remove it meanwhile
            found += self.compiled(digest).rglob("*")
        return sum(self._size(str(path.relative_to(self._folder))) for path in found)

    def _size(self, name: str) -> int:
        """Bytes that a file takes on the disk; 0 when it is not there."""
        try:
            return self.path(name).stat().st_blocks * 512
        except OSError:
            return 0


class Part:
    """A download in progress. May be used from any thread: a chunk is written where it is read, while it is at hand.

    Raises:
        OSError: from every method, when the disk is full or broken.
    """

    def __init__(self, folder: Path, content: Content) -> None:
        self.content = content
        self.chunks = chunk_count(content)
        self._target = folder / content.digest
        self._part = folder / f"{content.digest}.part"
        self._have = folder / f"{content.digest}.have"
        boot = boot_id()
        length = self.chunks + len(boot)
        fresh = not self._part.exists() or not self._have.exists() or self._have.stat().st_size != length
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0)
        self._data = os.open(self._part, flags, 0o600)
        try:
            self._marks = os.open(self._have, flags, 0o600)
        except OSError:
            os.close(self._data)
            raise
        if fresh:
            os.ftruncate(self._data, content.size)
        kept = os.pread(self._marks, length, 0)
        counts = {SYNCED, WRITTEN} if boot and kept[self.chunks :] == boot else {SYNCED}
        self._state = bytearray(
            one if one in counts else MISSING for one in kept[: self.chunks].ljust(self.chunks, b"\0")
        )
        self._missing = {chunk for chunk in range(self.chunks) if self._state[chunk] == MISSING}
        self._unsynced = self._state.count(WRITTEN)
        self._in_folder = False
        if kept != bytes(self._state) + boot:
            _write_all(self._marks, bytes(self._state) + boot, 0)
        self._hash = hashlib.sha256()
        self._hashed = 0  # chunks from the first one on that are in it
        self._ahead: list[int] = []  # chunks that were written since the disk was last sent some
        self._lock = threading.RLock()

    @property
    def missing(self) -> int:
        """How many chunks are not there."""
        return len(self._missing)

    def size_of(self, chunk: int) -> int:
        """Bytes that a chunk has; only the last may be short."""
        return min(self.content.chunk_size, self.content.size - chunk * self.content.chunk_size)

    def write(self, chunk: int, payload: Bytes) -> bool:
        """Keep a chunk; false when it is there already, is none of this artifact, or has the wrong size."""
        with self._lock:
            if self._data < 0 or chunk not in self._missing or len(payload) != self.size_of(chunk):
                return False
            _write_all(self._data, payload, chunk * self.content.chunk_size)
            _write_all(self._marks, bytes([WRITTEN]), chunk)
            self._state[chunk] = WRITTEN
            self._missing.discard(chunk)
            self._unsynced += 1
            if chunk == self._hashed:
                self._hash.update(payload)
                self._hashed += 1
            self._ahead.append(chunk)
            if len(self._ahead) >= AHEAD_CHUNKS:
                self._send_ahead()
            return True

    def _send_ahead(self) -> None:
        """Let the disk begin with what was written lately. Nobody waits for it, and nothing is safe by it."""
        first, last = min(self._ahead), max(self._ahead)
        self._ahead.clear()
        if sys.platform == "linux":
            start, size = first * self.content.chunk_size, (last - first + 1) * self.content.chunk_size
            with contextlib.suppress(OSError):
                # The name misleads: Linux begins to write what is not on the disk yet, and lets only the rest go.
                os.posix_fadvise(self._data, start, size, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Make what came survive a power cut."""
        with self._lock:
            if not self._unsynced or self._data < 0:
                return
            os.fdatasync(self._data)
            for chunk, state in enumerate(self._state):
                if state == WRITTEN:
                    self._state[chunk] = SYNCED
            _write_all(self._marks, self._state, 0)
            self._unsynced = 0
            if not self._in_folder:
                sync_folder(self._part.parent)
                self._in_folder = True

    def separate(self, chunks: tuple[int, ...], combined: Bytes) -> tuple[int, bytes] | None:
        """The one missing chunk in an exclusive-or of several; None where not just one of them is missing.

        A shorter chunk counts as filled up with zeros.
        """
        known = all(0 <= chunk < self.chunks for chunk in chunks) and len(set(chunks)) == len(chunks)
        if not known or len(combined) > self.content.chunk_size:
            return None
        with self._lock:
            lacking = [chunk for chunk in chunks if chunk in self._missing]
            if self._data < 0 or len(lacking) != 1:
                return None
            value = int.from_bytes(combined, "little")
            for chunk in chunks:
                if chunk != lacking[0]:
                    start, size = chunk * self.content.chunk_size, self.size_of(chunk)
                    value ^= int.from_bytes(os.pread(self._data, size, start), "little")
        size = self.size_of(lacking[0])
        if value >> (8 * size):
            return None
        return lacking[0], value.to_bytes(size, "little")

    def missing_ranges(self, limit: int) -> tuple[ChunkRange, ...]:
        """The lowest missing chunks as ranges, at most `limit` of them."""
        with self._lock:
            missing = sorted(self._missing)
        ranges: list[ChunkRange] = []
        for chunk in missing:
            if ranges and ranges[-1].last == chunk - 1:
                ranges[-1] = ChunkRange(ranges[-1].first, chunk)
            elif len(ranges) == limit:
                break
            else:
                ranges.append(ChunkRange(chunk, chunk))
        return tuple(ranges)

    def finish(self) -> bool:
        """Verify the whole and give it its name; when its digest is wrong everything is removed, and false."""
        with self._lock:
            good = self._digest() == self.content.digest
            if good:
                os.fsync(self._data)
            self.close()
        if good:
            rename_durably(self._part, self._target)
        else:
            self._part.unlink(missing_ok=True)
        self._have.unlink(missing_ok=True)
        return good

    def _digest(self) -> str:
        """Of the whole: what came in order was hashed when it came, while it was at hand."""
        for chunk in range(self._hashed, self.chunks):
            self._hash.update(os.pread(self._data, self.size_of(chunk), chunk * self.content.chunk_size))
        self._hashed = self.chunks
        return self._hash.hexdigest()

    def close(self) -> None:
        """Let the files go; the download can be opened again."""
        with self._lock:
            if self._data >= 0:
                os.close(self._data)
                os.close(self._marks)
                self._data = self._marks = -1


def _remove(path: Path) -> None:
    """Remove a file, or a folder of what was compiled, where there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write_all(descriptor: int, data: Bytes, offset: int) -> None:
    """As `os.pwrite`, which writes less than it was given on a disk that is nearly full."""
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, memoryview(data)[written:], offset + written)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
