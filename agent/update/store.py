"""The artifact store of a device: files by their SHA-256, and downloads that survive a power cut.

A download is a file `{digest}.part` of the final size beside `{digest}.have`, one byte a chunk. A chunk counts only
after its bytes were written; both files are synced before the whole is verified and renamed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from agent.protocol.manifest import Content, chunk_count
from agent.protocol.messages import ChunkRange

PIECE = 1 << 20


class ArtifactStore:
    """Artifacts below a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def path(self, digest: str) -> Path:
        """Where a verified artifact lies, or would."""
        return self._folder / digest

    def has(self, digest: str) -> bool:
        """Whether an artifact is there, whole."""
        return self.path(digest).is_file()

    def verify(self, digest: str) -> bool:
        """Whether the bytes of an artifact are still those of its name; a damaged one is removed."""
        path = self.path(digest)
        if not path.is_file():
            return False
        if _digest(path) == digest:
            return True
        path.unlink()
        return False

    def open_part(self, content: Content) -> Part:
        """The download of an artifact, or of a data set, as far as it has come."""
        return Part(self._folder, content)

    def collect_garbage(self, keep: Iterable[str]) -> None:
        """Remove every artifact and download whose digest is not kept."""
        kept = set(keep)
        for path in self._folder.iterdir():
            if path.name.partition(".")[0] not in kept:
                path.unlink(missing_ok=True)


class Part:
    """A download in progress.

    Raises:
        OSError: from every method, when the disk is full or broken.
    """

    def __init__(self, folder: Path, content: Content) -> None:
        self.content = content
        self.chunks = chunk_count(content)
        self._target = folder / content.digest
        self._part = folder / f"{content.digest}.part"
        self._have = folder / f"{content.digest}.have"
        fresh = not self._part.exists() or not self._have.exists() or self._have.stat().st_size != self.chunks
        flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0)
        self._data = os.open(self._part, flags, 0o600)
        self._marks = os.open(self._have, flags, 0o600)
        if fresh:
            os.ftruncate(self._data, content.size)
            os.pwrite(self._marks, bytes(self.chunks), 0)
        marks = os.pread(self._marks, self.chunks, 0)
        self._missing = {chunk for chunk in range(self.chunks) if not marks[chunk]}
        self._hash = hashlib.sha256()
        self._hashed = 0  # chunks from the first one on that are in it

    @property
    def missing(self) -> int:
        """How many chunks are not there."""
        return len(self._missing)

    def size_of(self, chunk: int) -> int:
        """Bytes that a chunk has; only the last may be short."""
        return min(self.content.chunk_size, self.content.size - chunk * self.content.chunk_size)

    def write(self, chunk: int, payload: bytes) -> bool:
        """Keep a chunk; false when it is there already, is none of this artifact, or has the wrong size."""
        if chunk not in self._missing or len(payload) != self.size_of(chunk):
            return False
        os.pwrite(self._data, payload, chunk * self.content.chunk_size)
        if len(self._missing) % 64 == 0:
            os.fdatasync(self._data)
        os.pwrite(self._marks, b"\1", chunk)
        self._missing.discard(chunk)
        if chunk == self._hashed:
            self._hash.update(payload)
            self._hashed += 1
        return True

    def separate(self, chunks: tuple[int, ...], combined: bytes) -> tuple[int, bytes] | None:
        """The one missing chunk in an exclusive-or of several; None where not just one of them is missing.

        A shorter chunk counts as filled up with zeros.
        """
        lacking = [chunk for chunk in chunks if chunk in self._missing]
        known = all(0 <= chunk < self.chunks for chunk in chunks) and len(set(chunks)) == len(chunks)
        if len(lacking) != 1 or not known or len(combined) > self.content.chunk_size:
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
        ranges: list[ChunkRange] = []
        for chunk in sorted(self._missing):
            if ranges and ranges[-1].last == chunk - 1:
                ranges[-1] = ChunkRange(ranges[-1].first, chunk)
            elif len(ranges) == limit:
                break
            else:
                ranges.append(ChunkRange(chunk, chunk))
        return tuple(ranges)

    def finish(self) -> bool:
        """Verify the whole and give it its name; when its digest is wrong everything is removed, and false."""
        os.fsync(self._data)
        good = self._digest() == self.content.digest
        self.close()
        if good:
            self._part.replace(self._target)
            self._have.unlink(missing_ok=True)
            folder = os.open(self._target.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
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
        if self._data >= 0:
            os.close(self._data)
            os.close(self._marks)
            self._data = self._marks = -1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
