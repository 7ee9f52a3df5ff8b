"""A download of which nothing is kept: which chunks have come, for `agent.update.download`. Pure."""

from __future__ import annotations

from agent.protocol.manifest import Content, chunk_count
from agent.protocol.messages import ChunkRange
from agent.update.store import Bytes


class Chunks:
    """In the place of the agent's file of a download: what comes is counted and thrown away.

    Attributes:
        content: what is downloaded.
        chunks: how many there are.
    """

    __slots__ = ("_missing", "chunks", "content")

    def __init__(self, content: Content) -> None:
        self.content = content
        self.chunks = chunk_count(content)
        self._missing = set(range(self.chunks))

    @property
    def missing(self) -> int:
        """How many have not come."""
        return len(self._missing)

    def write(self, chunk: int, payload: Bytes) -> bool:
        """Take one; whether it was missing and has its length."""
        if chunk not in self._missing or len(payload) != self._size_of(chunk):
            return False
        self._missing.discard(chunk)
        return True

    def separate(self, chunks: tuple[int, ...], combined: Bytes) -> tuple[int, Bytes] | None:
        """The one missing chunk of an exclusive-or, by its length alone; None where not just one of them is missing."""
        lacking = [chunk for chunk in chunks if chunk in self._missing]
        if len(lacking) != 1:
            return None
        return lacking[0], combined[: self._size_of(lacking[0])]

    def missing_ranges(self, limit: int) -> tuple[ChunkRange, ...]:
        """The lowest of those that are missing, as ranges."""
        ranges: list[ChunkRange] = []
        for chunk in sorted(self._missing):
            if ranges and ranges[-1].last == chunk - 1:
                ranges[-1] = ChunkRange(ranges[-1].first, chunk)
            elif len(ranges) == limit:
                break
            else:
                ranges.append(ChunkRange(chunk, chunk))
        return tuple(ranges)

    def sync(self) -> None:
        """Nothing is written."""

    def finish(self) -> bool:
        """What came is not kept, and taken for right."""
        return True

    def close(self) -> None:
        """Nothing is open."""

    def _size_of(self, chunk: int) -> int:
        return min(self.content.chunk_size, self.content.size - chunk * self.content.chunk_size)
