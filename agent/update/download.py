"""One artifact's download: chunks in, and when to say again what is missing. The clock is passed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agent.protocol.limits import LIMITS
from agent.protocol.manifest import Content
from agent.protocol.messages import ChunkRange, Need
from agent.update.store import Bytes

EVERY_CHUNKS = 8
STALLED_S = 1.0
LONGEST_WAIT_S = 30.0
WINDOW = 32
SYNC_S = 5.0  # a slow link's chunks are dear: a power cut shall not cost more of them than this


@dataclass(frozen=True)
class Allowance:
    """How a download may go on now.

    Attributes:
        window: chunks that may be in flight; 0 for none.
        rest_s: with a window of 0, in how many seconds there will be more.
        alone: broadcasts are not to be taken.
    """

    window: int = WINDOW
    rest_s: float = 0.0
    alone: bool = False


FREELY = Allowance()


class Part(Protocol):
    """Where a download's chunks go: `agent.update.store.Part`, or one that keeps nothing but which have come."""

    @property
    def content(self) -> Content:
        """What is downloaded."""
        ...

    @property
    def chunks(self) -> int:
        """How many there are."""
        ...

    @property
    def missing(self) -> int:
        """How many are not there."""
        ...

    def write(self, chunk: int, payload: Bytes) -> bool:
        """Keep a chunk; false when it is there already, or is none of this content."""
        ...

    def separate(self, chunks: tuple[int, ...], combined: Bytes) -> tuple[int, Bytes] | None:
        """The one missing chunk in an exclusive-or of several; None where not just one of them is missing."""
        ...

    def missing_ranges(self, limit: int) -> tuple[ChunkRange, ...]:
        """The lowest missing chunks as ranges, at most `limit` of them."""
        ...

    def sync(self) -> None:
        """Make what came survive a power cut."""
        ...

    def finish(self) -> bool:
        """Every chunk is there: whether they are the content."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


def write_to(part: Part, chunks: tuple[int, ...], payload: Bytes) -> int | None:
    """Write a chunk, or what a part lacks of an exclusive-or of several; which chunk it lacked, None when it did not.

    Raises:
        OSError: when the disk is full or broken.
    """
    found = (chunks[0], payload) if len(chunks) == 1 else part.separate(chunks, payload)
    return found[0] if found is not None and part.write(*found) else None


class DownloadProgress:
    """A download while it goes on.

    Attributes:
        left: chunks that are missing, as far as it was told: one may have been written before that.
    """

    def __init__(self, deployment_id: str, part: Part, deadline_s: float, now: float) -> None:
        self.deployment_id = deployment_id
        self.part = part
        self.left = part.missing
        self._deadline_s = deadline_s
        self._last_new = now
        self._synced_at = now
        self._since_need = 0
        self._wait = STALLED_S
        self._say_at = now
        self._resting = False
        self._anew = True
        self._ended = False  # the last chunk has come: what is missing now was lost

    def take(self, chunks: tuple[int, ...], payload: Bytes, now: float) -> bool:
        """Take a chunk, or an exclusive-or of several; true when every chunk is there."""
        index = write_to(self.part, chunks, payload)
        return index is not None and self.written(index, now)

    def written(self, index: int, now: float) -> bool:
        """A chunk that was missing has been written to the part; true when every chunk is there."""
        self.left -= 1
        self._last_new, self._wait = now, STALLED_S
        self._since_need += 1
        self._ended = self._ended or index == self.part.chunks - 1
        if self._say_at > now:
            self._say_at = max(self._say_at, now + STALLED_S)
        return self.left == 0

    def sync(self, now: float) -> None:
        """Make what came survive a power cut, where it is time to.

        Raises:
            OSError: when the disk is full or broken.
        """
        if now - self._synced_at >= SYNC_S:
            self._synced_at = now
            self.part.sync()

    def need(self, now: float, allowed: Allowance = FREELY) -> Need | None:
        """What to say now: at the start, every few chunks, and when nothing comes, with growing pauses."""
        goes_on = self._resting and allowed.window > 0
        few = 1 if self._ended and self.part.missing <= EVERY_CHUNKS else EVERY_CHUNKS
        enough = self._since_need >= max(1, min(few, allowed.window // 4))
        if now < self._say_at and not goes_on and not enough:
            return None
        if self._since_need == 0 and now - self._last_new > STALLED_S:
            self._wait = min(self._wait * 1.5, LONGEST_WAIT_S)
        self._since_need = 0
        self._resting = allowed.window == 0
        self._say_at = now + max(self._wait, allowed.rest_s)
        rest_s = min(allowed.rest_s, LIMITS.rest_s)
        anew, self._anew = self._anew, False
        missing = self.part.missing_ranges(LIMITS.missing_ranges)
        return Need(self.part.content.digest, self.deployment_id, missing, allowed.window, allowed.alone, rest_s, anew)

    def no_more(self, now: float) -> Need:
        """What to say when nothing is wanted for now, or another source brings it; waiting is no stalling."""
        self.waited(now)
        return Need(self.part.content.digest, self.deployment_id, ())

    def waited(self, now: float) -> None:
        """It was told to wait until now: that is no stalling."""
        self._last_new, self._say_at, self._wait = now, now, STALLED_S

    def link_up(self, now: float) -> None:
        """The link is up again: ask at once; what was on its way is gone."""
        self._say_at, self._wait, self._anew = now, STALLED_S, True

    def overdue(self, now: float) -> bool:
        """Whether no new byte has come for longer than the deployment allows."""
        return now - self._last_new > self._deadline_s

    def silent_s(self, now: float) -> float:
        """Seconds since something new came, or since it began."""
        return now - self._last_new
