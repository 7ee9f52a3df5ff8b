"""One artifact's download: chunks in, and when to say again what is missing. The clock is passed in."""

from __future__ import annotations

from agent.protocol.limits import LIMITS
from agent.protocol.messages import Need
from agent.update.store import Part

EVERY_CHUNKS = 8
STALLED_S = 1.0
LONGEST_WAIT_S = 30.0
WINDOW = 32
SYNC_S = 5.0  # a slow link's chunks are dear: a power cut shall not cost more of them than this


class DownloadProgress:
    """A download while it goes on."""

    def __init__(self, deployment_id: str, part: Part, deadline_s: float, now: float) -> None:
        self.deployment_id = deployment_id
        self.part = part
        self._deadline_s = deadline_s
        self._last_new = now
        self._synced_at = now
        self._since_need = 0
        self._wait = STALLED_S
        self._say_at = now

    def chunk(self, index: int, payload: bytes, now: float) -> bool:
        """Take a chunk; true when every chunk is there."""
        if self.part.write(index, payload):
            self._last_new, self._wait = now, STALLED_S
            self._since_need += 1
            if self._since_need >= EVERY_CHUNKS:
                self._say_at = now
            else:
                self._say_at = max(self._say_at, now + STALLED_S) if self._say_at > now else self._say_at
            if now - self._synced_at >= SYNC_S:
                self._synced_at = now
                self.part.sync()
        return self.part.missing == 0

    def need(self, now: float) -> Need | None:
        """What to say now: at the start, every few chunks, and when nothing comes, with growing pauses."""
        if now < self._say_at:
            return None
        if self._since_need == 0 and now - self._last_new > STALLED_S:
            self._wait = min(self._wait * 1.5, LONGEST_WAIT_S)
        self._since_need = 0
        self._say_at = now + self._wait
        return self._message()

    def say_now(self, now: float) -> None:
        """The link is up again: ask at once."""
        self._say_at, self._wait = now, STALLED_S

    def overdue(self, now: float) -> bool:
        """Whether no new byte has come for longer than the deployment allows."""
        return now - self._last_new > self._deadline_s

    def silent_s(self, now: float) -> float:
        """Seconds since something new came, or since it began."""
        return now - self._last_new

    def nothing(self, now: float) -> Need:
        """What to say where another source brings it all: nothing is missing."""
        self._say_at = now + STALLED_S
        return Need(self.part.content.digest, self.deployment_id, (), WINDOW)

    def _message(self) -> Need:
        missing = self.part.missing_ranges(LIMITS.missing_ranges)
        return Need(self.part.content.digest, self.deployment_id, missing, WINDOW)
