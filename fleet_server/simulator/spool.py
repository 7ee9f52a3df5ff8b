"""Telemetry of a simulated device until the server says that it has it: the agent's spool, without its disk. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agent.protocol.codec import encode
from agent.protocol.messages import TelemetryAck, TelemetryBatch
from agent.telemetry.pace import SendPace

LIMIT = 500  # as the agent keeps in memory where its disk can't be written


@dataclass(slots=True)
class _Kept:
    payload: bytes
    sent_at: float | None = None


class Spool:
    """Batches by the names that the server stores each once under; the oldest go when there are too many.

    Attributes:
        pace: how fast they are sent.
        spool_id: of the batches that are made from now on; each start of the device has its own.
        dropped: how many were thrown away.
    """

    __slots__ = ("_kept", "_sequence", "dropped", "pace", "spool_id")

    def __init__(self, spool_id: str) -> None:
        self.spool_id = spool_id
        self.pace = SendPace()
        self.dropped = 0
        self._sequence = 0
        self._kept: dict[tuple[str, int], _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, make: Callable[[str, int], TelemetryBatch]) -> None:
        """Keep a batch made for the spool's id and its next sequence."""
        self._sequence += 1
        self._kept[self.spool_id, self._sequence] = _Kept(encode(make(self.spool_id, self._sequence)))
        if len(self._kept) > LIMIT:
            del self._kept[next(iter(self._kept))]
            self.dropped += 1

    def due(self, now: float) -> list[bytes]:
        """The oldest that are not on their way, as many as the pace allows; from now on they are."""
        underway = [one for one in self._kept.values() if one.sent_at is not None]
        if any(now - (one.sent_at or 0.0) >= self.pace.resend_s for one in underway):
            self.pace.late()
            for one in underway:
                one.sent_at = None
            underway = []
        free = max(0, self.pace.limit - len(underway))
        found = [one for one in self._kept.values() if one.sent_at is None][:free]
        for one in found:
            one.sent_at = now
        return [one.payload for one in found]

    def acknowledge(self, ack: TelemetryAck) -> int:
        """Forget what the server has stored; how many that were."""
        self.pace.stored()
        return sum(self._kept.pop((ack.spool_id, sequence), None) is not None for sequence in ack.sequences)

    def restarted(self, spool_id: str) -> None:
        """The device started again: what is kept stays, and is sent anew; new batches have a new name."""
        self.spool_id, self._sequence = spool_id, 0
        for one in self._kept.values():
            one.sent_at = None
